"""What only the simulated network has: links with numbers, silence, partitions, stale readers. No test takes time."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from llmasos.config import CONNECT_TIMEOUT_S, LOOKUP_TIMEOUT_S
from llmasos.errors import ConnectionLostError, PeerTimeoutError, SwarmUnreachableError
from llmasos.network import Stream, call
from sim.loop import run
from sim.network import KEEPALIVE_S, Link, SimNetwork, SimSwarm

Scenario = Callable[[SimSwarm, SimNetwork, SimNetwork, SimNetwork], Awaitable[None]]


def play(scenario: Scenario, *, link: Link | None = None, stale_s: float = 0.0) -> None:
    """With three members, all of which serve an echo, over links of 20 ms and 1 MB/s."""
    chosen = link or Link(latency_s=0.020, bytes_per_s=1e6)

    async def main() -> None:
        swarm = SimSwarm(seed=3, links=lambda source, target: chosen, stale_s=stale_s)
        members = [swarm.network(name) for name in ("a", "b", "c")]
        for member in members:
            member.serve("echo", echo)
        await scenario(swarm, *members)

    run(main())


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_round_trip_takes_latency_and_bytes() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        stream = await a.connect(b.contact, "echo")
        assert now() == pytest.approx(0.040)
        await stream.send(bytes(500_000))
        await stream.receive()
        assert now() == pytest.approx(0.040 + 2 * (0.020 + 0.5))

    play(scenario)


def test_streams_share_the_wire_between_two_peers() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        streams = [await a.connect(b.contact, "echo") for _ in range(2)]
        started_at = now()
        for stream in streams:
            await stream.send(bytes(500_000))
        for stream in streams:
            await stream.receive()
        assert now() - started_at == pytest.approx(2 * 0.020 + 3 * 0.5)  # there 0.5 and 1.0; back 1.0 and 1.5

    play(scenario)


def test_jitter_never_reorders() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        stream = await a.connect(b.contact, "echo")
        for number in range(200):
            await stream.send(bytes([number]))
        assert [(await stream.receive())[0] for _ in range(200)] == list(range(200))

    play(scenario, link=Link(0.02, 1e6, jitter=5.0))


def test_a_hung_peer_is_silent_and_comes_back_with_what_was_sent() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        stream = await a.connect(b.contact, "echo")
        swarm.hang(b.peer_id)
        await stream.send(b"into the dark")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.receive(), 10)
        with pytest.raises(PeerTimeoutError):
            await call(a, b.contact, "echo", b"x", 2)
        started_at = now()
        with pytest.raises(ConnectionLostError):
            await a.connect(b.contact, "echo")
        assert now() - started_at == pytest.approx(CONNECT_TIMEOUT_S)
        assert await b.publish("t", b"x", 20) is False
        with pytest.raises(SwarmUnreachableError):
            await b.lookup("t")
        swarm.heal(b.peer_id)
        assert await stream.receive() == b"into the dark"

    play(scenario)


def test_the_transport_gives_up_on_lasting_silence() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        stream = await a.connect(b.contact, "echo")
        swarm.hang(b.peer_id)
        started_at = now()
        with pytest.raises(ConnectionLostError, match="timed out"):
            await stream.receive()
        assert now() - started_at == pytest.approx(KEEPALIVE_S)

    play(scenario)


def test_a_cut_link_leaves_the_ways_around_it() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        swarm.partition(a.peer_id, b.peer_id)
        with pytest.raises(ConnectionLostError):
            await a.connect(b.contact, "echo")
        for source, target in ((a, c), (c, b)):
            assert await call(source, target.contact, "echo", b"x", 1) == b"x"
        assert await b.publish("t", b"seen all the same", 20)
        assert b.peer_id in await a.lookup("t")
        swarm.heal()
        assert await call(a, b.contact, "echo", b"x", 1) == b"x"

    play(scenario)


def test_a_parted_registry_shows_the_other_side_as_it_was() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        assert await b.publish("t", b"before", 20)
        swarm.partition([a.peer_id], [b.peer_id, c.peer_id], registry=True)
        await asyncio.sleep(1)
        assert await b.publish("t", b"after", 40)
        assert (await a.lookup("t"))[b.peer_id].value == b"before"
        assert (await c.lookup("t"))[b.peer_id].value == b"after"
        await asyncio.sleep(20)
        assert b.peer_id not in await a.lookup("t")
        swarm.heal()
        assert (await a.lookup("t"))[b.peer_id].value == b"after"

    play(scenario)


def test_a_stale_reader_is_behind_by_no_more_than_was_said() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        ages = []
        for turn in range(100):
            assert await b.publish("t", bytes([turn]), 60)
            await asyncio.sleep(0.5)
            found = await a.lookup("t")
            if b.peer_id in found:
                ages.append(turn - found[b.peer_id].value[0])
            assert (await b.lookup("t"))[b.peer_id].value == bytes([turn]), "a peer sees its own"
        assert max(ages) in (4, 5, 6, 7)
        assert min(ages) == 0

    play(scenario, stale_s=3.0)


def test_a_restarted_peer_has_its_id_and_none_of_its_streams() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        stream = await a.connect(b.contact, "echo")
        again = swarm.restart(b.peer_id)
        assert again.peer_id == b.peer_id
        assert b.failed.is_set()
        with pytest.raises(ConnectionLostError):
            await stream.receive()
        with pytest.raises(ConnectionLostError, match="does not serve"):
            await a.connect(again.contact, "echo")
        again.serve("echo", echo)
        assert await call(a, b.contact, "echo", b"x", 1) == b"x"

    play(scenario)


def test_a_killed_peers_frames_under_way_still_arrive_then_the_end() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        async def tell(stream: Stream) -> None:
            await stream.send(b"last words")
            await asyncio.Event().wait()

        b.serve("tell", tell)
        stream = await a.connect(b.contact, "tell")
        killed_at = now()
        swarm.kill(b.peer_id)
        assert await stream.receive() == b"last words"
        with pytest.raises(ConnectionLostError):
            await stream.receive()
        assert now() - killed_at <= 0.020 + 1e-6
        assert not a.streams
        assert not b.streams

    play(scenario)


def test_nobody_answers_is_said_after_a_while() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        swarm.kill(b.peer_id)
        with pytest.raises(SwarmUnreachableError):
            await a.join([b.multiaddr])
        assert now() <= LOOKUP_TIMEOUT_S + 1

    play(scenario)


def test_an_idle_stream_costs_no_task() -> None:
    async def scenario(swarm: SimSwarm, a: SimNetwork, b: SimNetwork, c: SimNetwork) -> None:
        before = len(asyncio.all_tasks())
        streams = [await a.connect(b.contact, "echo") for _ in range(100)]
        assert len(asyncio.all_tasks()) == before + 100  # the handlers, and nothing else
        for stream in streams:
            await stream.close()
        await asyncio.sleep(1)
        assert len(asyncio.all_tasks()) == before
        assert not a.streams
        assert not b.streams

    play(scenario)
