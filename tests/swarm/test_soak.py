"""Two thousand short sessions against one peer, clients killed in between: nothing is left, and memory is flat."""

import asyncio
import gc
import random
import tracemalloc

from llmasos.client.router import Router
from llmasos.config import SESSION_LEASE_S, ClientConfig
from llmasos.errors import LLMasOSError
from llmasos.peer.peer import Peer
from llmasos.routing import records
from llmasos.routing.directory import Directory
from sim.loop import run
from sim.network import SimSwarm
from sim.runner import from_numbers, reference, to_numbers
from sim.stream import KEEPALIVE_S
from sim.swarm import SimClient, SimCluster, SimModel

MODEL = SimModel(blocks=2)
SESSIONS, AT_ONCE, PER_ROUND = 2_000, 20, 100
WARM = 4
"""Rounds until everything that is made once has been made."""
SLACK_BYTES = 64_000
"""Less than 40 bytes a session: one number that each leaves behind would show."""


async def one_session(client: SimClient, rng: random.Random) -> None:
    numbers = [rng.getrandbits(60) for _ in range(rng.randint(2, 12))]
    cut = rng.randint(1, len(numbers) - 1)
    expected = reference(MODEL.blocks, numbers)
    async with client.session(20) as session:
        await session.forward(from_numbers(numbers[:cut]))
        for index in range(cut, len(numbers)):
            assert to_numbers(await session.forward(from_numbers(numbers[index : index + 1]))) == [expected[index]]


def check_empty(peer: Peer) -> None:
    """The peer holds nothing of any session."""
    scheduler, engine = peer.engine.scheduler, peer.engine
    scheduler.check()
    assert (peer.handler.sessions, scheduler.active_sessions, scheduler.queued_tokens) == (0, 0, 0)
    assert scheduler.kv_free_tokens == scheduler.kv_tokens
    assert not engine._pending
    assert not engine._leaving
    assert not peer.runner._caches  # type: ignore[attr-defined]
    assert not peer.network.streams  # type: ignore[attr-defined]


def test_nothing_is_left_of_two_thousand_sessions() -> None:
    async def main() -> None:
        world, rng = SimSwarm(seed=3), random.Random(3)
        router: Router | None = None
        memory: list[int] = []
        async with SimCluster(world, MODEL) as cluster:
            await cluster.start("peer", "0:2", kv_tokens=20 * 200)
            peer = cluster.peers["peer"]
            idle_tasks = len(asyncio.all_tasks())
            for _ in range(SESSIONS // PER_ROUND):
                # half of the sessions by a client that lives on, half by one that is killed in the middle
                place, victim = world.network("client", listen=False), world.network("victim", listen=False)
                router = router or Router(place, Directory(place), ClientConfig(), random.Random(1))
                router._network = router.directory._network = place
                client = SimClient(place, router, ClientConfig(), MODEL)
                killed = SimClient(
                    victim, Router(victim, Directory(victim), ClientConfig(), random.Random(2)), ClientConfig(), MODEL
                )
                await asyncio.gather(*(works(client, rng) for _ in range(AT_ONCE)))
                doomed = [asyncio.create_task(works(killed, rng)) for _ in range(AT_ONCE)]
                await asyncio.sleep(rng.uniform(0.0, 0.05))
                if rng.random() < 0.5:
                    world.kill(victim.peer_id)
                else:
                    world.hang(victim.peer_id)
                for task in doomed:
                    task.cancel()
                await asyncio.gather(*doomed, return_exceptions=True)
                await asyncio.sleep(SESSION_LEASE_S + 1)
                check_empty(peer)
                await asyncio.sleep(KEEPALIVE_S)  # until the simulator itself has forgotten the streams that hung
                await place.close()
                await victim.close()
                del place, victim, client, killed, doomed
                records._parse.cache_clear()  # bounded, and not yet full
                gc.collect()
                memory.append(tracemalloc.get_traced_memory()[0])
                assert len(asyncio.all_tasks()) == idle_tasks
            assert router is not None
            assert len(router.health.tickets) == 0
            assert len(router.health) == 1
        growth = min(memory[-5:]) - min(memory[WARM : WARM + 5])  # what is lowest is least disturbed by timers
        assert growth < SLACK_BYTES, f"{growth} bytes more after {SESSIONS} sessions: {memory}"

    async def works(client: SimClient, rng: random.Random) -> None:
        for _ in range(PER_ROUND // AT_ONCE // 2):
            try:
                await one_session(client, rng)
            except LLMasOSError:
                assert client.network._down is not None or client.network.swarm.is_hung(client.network.peer_id)
                return

    tracemalloc.start()
    try:
        run(main())
    finally:
        tracemalloc.stop()
