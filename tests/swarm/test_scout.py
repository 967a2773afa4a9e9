"""Peers are asked before a session goes there: crowds spread, silence is passed by, the near ones are found."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from random import Random

import pytest

from llmasos.client.session import Session
from llmasos.errors import MissingBlocksError
from llmasos.network import PeerId
from sim.loop import run
from sim.network import SimSwarm, peer_of
from sim.stream import LAN, Link
from sim.swarm import SimCluster, SimModel

MODEL = SimModel(blocks=6)


@pytest.mark.parametrize("seed", range(6))
def test_a_hundred_clients_with_one_session_each_and_old_views_do_not_herd(seed: int) -> None:
    """Ten equal peers; each client looks up a registry that is ten seconds behind, and knows of no other client."""

    async def main() -> Counter[str]:
        rng = Random(f"herd {seed}")
        async with SimCluster(SimSwarm(seed=seed, stale_s=10.0), MODEL) as cluster:
            for number in range(10):
                await cluster.start(f"peer{number}", "0:6")
            await asyncio.sleep(15.0)  # until even the oldest view shows all of them
            chosen: Counter[str] = Counter()

            async def one(number: int, begin_s: float) -> None:
                await asyncio.sleep(begin_s)
                async with (
                    cluster.client(f"client{number}", seed=rng.getrandbits(32)) as client,
                    client.session(64) as session,
                ):
                    chosen[session.route.peers[0]] += 1
                    await asyncio.sleep(10.0)

            async with asyncio.TaskGroup() as group:
                for number in range(100):
                    group.create_task(one(number, rng.uniform(0.0, 10.0)))
            return chosen

    chosen = run(main())
    assert chosen.total() == 100
    assert max(chosen.values()) <= 1.5 * 10


def test_a_session_does_not_wait_for_a_peer_that_hangs() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with SimCluster(SimSwarm(seed=3), MODEL) as cluster:
            for name in "abcd":
                await cluster.start(name, "0:6")
            for name in "abc":
                cluster.world.hang(peer_of(name))
            async with cluster.client("client") as client:
                for _ in range(6):
                    begin = loop.time()
                    async with client.session(64) as session:
                        assert session.route.peers == (peer_of("d"),)
                        assert session.failovers == 0
                    assert loop.time() - begin < 2.0

    run(main())


def test_the_nearest_are_found() -> None:
    """Thirty peers a hundred times as far as three others; nothing in the records tells them apart."""
    near = [peer_of(f"near{number}") for number in range(3)]

    def link(source: PeerId, target: PeerId) -> Link:
        return LAN if source in near or target in near else Link(latency_s=0.1)

    async def main() -> list[bool]:
        async with SimCluster(SimSwarm(seed=8, links=link), MODEL) as cluster:
            for peers, name in ((3, "near"), (30, "far")):
                for number in range(peers):
                    await cluster.start(f"{name}{number}", "0:6")
            async with cluster.client("client") as client:
                found = []
                for _ in range(20):
                    async with client.session(64) as session:
                        found.append(session.route.peers[0] in near)
                return found

    assert all(run(main())[10:])


def test_a_peer_that_is_fuller_than_its_record_says_is_passed_by() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=4, stale_s=8.0), MODEL) as cluster:
            full = await cluster.start("full", "0:6", kv_tokens=100)
            free = await cluster.start("free", "0:6", kv_tokens=1_000)
            await asyncio.sleep(10.0)
            async with cluster.client("first") as first:
                request = replace(MODEL.request(80), pin=(full,))
                async with Session(first.network, first.router, request, first.config):
                    for number in range(8):
                        async with (
                            cluster.client(f"client{number}", seed=number) as client,
                            client.session(80) as session,
                        ):
                            assert session.route.peers == (free,)
                            assert session.failovers == 0

    run(main())


def test_the_only_peer_with_some_blocks_is_taken_as_soon_as_it_is_back() -> None:
    """For two minutes it cannot be reached, and is announced; it was left alone for as long once more."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=5), MODEL) as cluster:
            await cluster.start("first", "0:4")
            alone = await cluster.start("alone", "4:6")
            async with cluster.client("client") as client:
                cluster.world.partition(peer_of("client"), alone)
                for _ in range(24):
                    with pytest.raises(MissingBlocksError):
                        async with client.session(64):
                            pass
                    await asyncio.sleep(4.0)
                cluster.world.heal()
                async with client.session(64) as session:
                    assert session.route.peers[-1] == alone

    run(main())


def test_a_crowd_on_a_peer_that_starts_again_finds_it_at_once() -> None:
    """Each of its sessions counted as a failure of the peer: it was left alone for two minutes."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=5), MODEL) as cluster:
            await cluster.start("first", "0:4")
            alone = await cluster.start("alone", "4:6")
            async with cluster.client("client") as client, AsyncExitStack() as sessions:
                for _ in range(8):
                    await sessions.enter_async_context(client.session(64))
                cluster.kill("alone")
                await asyncio.sleep(3.0)
                await cluster.start("alone", "4:6")
                async with client.session(64) as session:
                    assert session.route.peers[-1] == alone

    run(main())
