"""Whatever a stranger sends: a typed answer to him, and nothing for anybody else to notice."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from llmasos.config import SESSION_LEASE_S, DType
from llmasos.errors import ConnectionLostError
from llmasos.network import Stream
from llmasos.peer.peer import Peer
from llmasos.wire import (
    PROTOCOL,
    AnyMessage,
    Attach,
    Close,
    Contact,
    Draining,
    Failed,
    NextHop,
    Open,
    Opened,
    Ping,
    Pong,
    Replay,
    Result,
    Step,
    Tensor,
    decode,
    encode,
)
from sim.loop import run
from sim.network import SimNetwork, SimSwarm
from sim.runner import NUMBERS, from_numbers, reference, to_numbers
from sim.swarm import SimCluster, SimModel

MODEL = SimModel(blocks=5)
Scenario = Callable[[SimNetwork, Peer], Awaitable[None]]


def against_a_peer(scenario: Scenario) -> None:
    """Run a stranger's scenario beside an honest session, which must not notice, on a peer that must stay whole."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=5), MODEL) as cluster:
            await cluster.start("peer", "0:5")
            peer = cluster.peers["peer"]
            async with cluster.client("honest") as client, client.session() as session:
                numbers = [3, 1, 4, 1, 5, 9, 2, 6]
                assert to_numbers(await session.forward(from_numbers(numbers[:4]))) == reference(5, numbers)[3:4]
                async with cluster.world.network("stranger", listen=False) as stranger:
                    await scenario(stranger, peer)
                assert to_numbers(await session.forward(from_numbers(numbers[4:]), keep=4)) == reference(5, numbers)[4:]
                assert session.failovers == 0
            await peer.handler.wait_until_idle()
            peer.engine.scheduler.check()
            assert peer.engine.scheduler.kv_free_tokens == peer.engine.scheduler.kv_tokens
            assert peer.announcer.state == "online"

    run(main())


def opening(**changes: object) -> Open:
    fields = {"session": "s", "digest": MODEL.digest, "dtype": "float32", "start": 0, "end": 5, "tokens": 50}
    return Open(**{**fields, **changes})  # type: ignore[arg-type]


def step(number: int, position: int, rows: list[int], **changes: int) -> Step:
    return Step(step=number, position=position, keep=changes.get("keep", 1), hidden=from_numbers(rows))


async def ask(stream: Stream, message: AnyMessage | bytes) -> AnyMessage:
    await stream.send(message if isinstance(message, bytes) else encode(message))
    return decode(await stream.receive())


async def opened(stranger: SimNetwork, peer: Peer, **changes: object) -> Stream:
    stream = await stranger.connect(peer.network.contact, PROTOCOL)
    assert isinstance(await ask(stream, opening(**changes)), Opened)
    return stream


async def ends(stream: Stream) -> None:
    with pytest.raises(ConnectionLostError):
        await stream.receive()


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x00",
        b"\x01",
        b"\x01\xc1",
        b"\xff" * 1_000,
        b"\x01" + msgspec.msgpack.encode({"type": "open"}),
        b"\x01" + msgspec.msgpack.encode({"type": "nonsense"}),
        b"\x01" + msgspec.msgpack.encode([1, 2, 3]),
        encode(opening())[:-3],
        encode(Close()),
        encode(step(0, 0, [1])),
        encode(Result(step=0, hidden=from_numbers([1]))),
        encode(opening()).replace(b"\xa5exact", b"\xa5int31"),
    ],
    ids=range(13),
)
def test_a_stream_that_begins_with_garbage(frame: bytes) -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        stream = await stranger.connect(peer.network.contact, PROTOCOL)
        answer = await ask(stream, frame)
        assert isinstance(answer, Failed)
        assert answer.code == "bad_request"
        await ends(stream)

    against_a_peer(scenario)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"digest": "other"}, "unsupported", "another checkpoint"),
        ({"dtype": "bfloat16"}, "unsupported", "float32"),
        ({"start": 3, "end": 3}, "bad_request", "3:3"),
        ({"start": 4, "end": 1}, "bad_request", "4:1"),
        ({"start": 2, "end": 9}, "unsupported", "0:5"),
        ({"tokens": 9_000}, "bad_request", "context"),
        ({"tokens": 0}, None, ""),
    ],
)
def test_a_session_that_cannot_be(changes: dict[str, object], code: str | None, words: str) -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        stream = await stranger.connect(peer.network.contact, PROTOCOL)
        answer = await ask(stream, opening(**changes))
        if code is None:
            assert isinstance(answer, Opened)
            await stream.close()
        else:
            assert isinstance(answer, Failed)
            assert (answer.code, words in answer.message) == (code, True)

    against_a_peer(scenario)


def wrong_tensor(dtype: DType, width: int) -> Tensor:
    return Tensor(dtype, (1, width), memoryview(bytes(width * (4 if dtype == "float32" else 2))))


@pytest.mark.parametrize(
    ("hidden", "position", "words"),
    [
        (wrong_tensor("bfloat16", 2), 0, "expected float32 rows of 2"),
        (wrong_tensor("float32", 3), 0, "expected float32 rows of 2"),
        (from_numbers([2**63]), 0, "numbers that are none"),
        (from_numbers([1]), 7, "position 7"),
        (Tensor("float32", (1, 3), memoryview(bytes(7)), "int8"), 0, "expected float32 rows of 2"),
        (Tensor("float32", (1, 2), memoryview(b"\0\0\xc0\x7f\1\1"), "int8"), 0, "numbers that are none"),
    ],
)
def test_a_step_that_cannot_be(hidden: Tensor, position: int, words: str) -> None:
    """The step fails; the session can go on with a good one."""

    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        stream = await opened(stranger, peer)
        answer = await ask(stream, Step(step=0, position=position, keep=1, hidden=hidden))
        assert isinstance(answer, Failed)
        assert (answer.code, answer.step, words in answer.message) == ("bad_request", 0, True)
        answer = await ask(stream, step(1, 0, [7]))
        assert isinstance(answer, Result)
        assert to_numbers(answer.hidden) == reference(5, [7])
        await stream.close()

    against_a_peer(scenario)


def test_a_session_that_outgrows_the_budget_is_refused_not_killed() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        stream = await opened(stranger, peer, tokens=8)
        peer.engine.scheduler.kv_tokens -= peer.engine.scheduler.kv_free_tokens
        answer = await ask(stream, step(0, 0, list(range(9))))
        assert isinstance(answer, Failed)
        assert answer.code == "refused"
        assert isinstance(await ask(stream, step(1, 0, list(range(8)))), Result)
        await stream.close()
        peer.engine.scheduler.kv_tokens = 65_536

    against_a_peer(scenario)


def test_a_repeated_step_is_answered_from_the_record() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        stream = await opened(stranger, peer)
        first = await ask(stream, step(4, 0, [1, 2, 3]))
        passes = peer.engine.passes
        assert await ask(stream, step(4, 0, [1, 2, 3])) == first
        assert peer.engine.passes == passes
        await stream.send(encode(step(2, 0, [9])))  # older than the last: nobody waits for it any more
        assert isinstance(await ask(stream, Ping(nonce=3, padding=b"x")), Pong)
        assert peer.engine.passes == passes
        await stream.close()

    against_a_peer(scenario)


def test_old_answers_are_forgotten_with_what_was_rolled_back() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        tokens = 2_000
        stream = await opened(stranger, peer, tokens=tokens)
        steps = [step(number, 0, [number] * tokens, keep=1) for number in range(10)]
        answers = [await ask(stream, each) for each in steps]
        assert await ask(stream, steps[-1]) == answers[-1]
        await stream.send(encode(steps[0]))  # ten times what the session has reserved is not held for it
        assert isinstance(await ask(stream, Ping(padding=b"x")), Pong)
        await stream.close()

    against_a_peer(scenario)


def test_a_step_that_fails_half_way_leaves_nothing_to_go_on_from() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        first_pass = [1] * peer.engine.scheduler.max_batch_tokens
        stream = await opened(stranger, peer, tokens=len(first_pass) + 10)
        answer = await ask(stream, step(0, 0, [*first_pass, NUMBERS]))
        assert isinstance(answer, Failed)
        answer = await ask(stream, step(1, len(first_pass), [7]))
        assert isinstance(answer, Failed)
        assert "the session ends at 0" in answer.message
        answer = await ask(stream, step(2, 0, [5, 6]))
        assert isinstance(answer, Result)
        assert to_numbers(answer.hidden) == reference(5, [5, 6])[-1:]
        await stream.close()

    against_a_peer(scenario)


def test_who_asks_for_more_replays_than_it_takes_is_dropped() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        stream = await opened(stranger, peer)
        for number in range(50):
            await ask(stream, step(number, number, [number]))
        replay = encode(Replay(step=100, until=50, chunk=1, hops=1))
        sessions = peer.engine.scheduler.active_sessions
        for _ in range(1_000):
            await stream.send(replay)
        for _ in range(20):
            await asyncio.sleep(SESSION_LEASE_S / 5)
            if peer.engine.scheduler.active_sessions < sessions:
                return
            await stream.send(replay)
        pytest.fail("it is still there")

    against_a_peer(scenario)


def test_nobody_else_can_step_a_session() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        mine = await opened(stranger, peer, session="mine")
        for name in ("mine", "no such session"):
            link = await stranger.connect(peer.network.contact, PROTOCOL)
            await link.send(encode(Attach(session=name)))
            await link.send(encode(step(0, 0, [1])))
            answer = decode(await link.receive())
            assert isinstance(answer, Failed)
            assert answer.code in ("bad_request", "unknown_session")
            await ends(link)
        assert isinstance(await ask(mine, step(0, 0, [1])), Result)
        again = await stranger.connect(peer.network.contact, PROTOCOL)
        assert isinstance(await ask(again, opening(session="mine")), Failed)
        await mine.close()

    against_a_peer(scenario)


def test_a_stranger_is_told_how_busy_a_peer_is() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        stream = await stranger.connect(Contact(peer.network.peer_id), PROTOCOL)
        await stream.send(encode(Ping(nonce=3, padding=b"xy")))
        free = peer.engine.scheduler.kv_free_tokens
        pong = Pong(nonce=3, padding=b"xy", sessions=1, kv_free_tokens=free)
        assert decode(await stream.receive()) == pong
        await stream.close()

    against_a_peer(scenario)


def test_a_next_hop_that_does_not_exist() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        nowhere = NextHop(Contact("12D3KooWnobody", ("/ip4/127.0.0.1/tcp/1",)), "s")
        stream = await opened(stranger, peer, downstream=nowhere)
        answer = await ask(stream, step(0, 0, [1]))
        assert isinstance(answer, Failed)
        assert (answer.code, answer.peer, answer.step) == ("next_hop_lost", "12D3KooWnobody", 0)
        await stream.close()

    against_a_peer(scenario)


def test_a_client_that_falls_silent_loses_its_session() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=5), MODEL) as cluster:
            await cluster.start("peer", "0:5")
            peer = cluster.peers["peer"]
            async with cluster.world.network("silent", listen=False) as silent:
                stream = await opened(silent, peer)
                cluster.world.hang(silent.peer_id)
                begin = silent.now()
                await peer.handler.wait_until_idle()
                assert silent.now() - begin <= SESSION_LEASE_S + 1
                assert peer.engine.scheduler.kv_free_tokens == peer.engine.scheduler.kv_tokens
                del stream

    run(main())


def test_a_draining_peer_takes_no_new_session_and_waits_for_those_it_has() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=5), MODEL) as cluster:
            await cluster.start("peer", "0:5")
            peer = cluster.peers["peer"]
            async with cluster.world.network("a", listen=False) as place:
                stream = await opened(place, peer)
                stopping = asyncio.create_task(cluster.stop("peer"))
                await asyncio.sleep(1)
                late = await place.connect(peer.network.contact, PROTOCOL)
                answer = await ask(late, opening(session="late"))
                assert isinstance(answer, Failed)
                assert (answer.code, "draining" in answer.message) == ("refused", True)
                assert isinstance(decode(await stream.receive()), Draining)
                assert isinstance(await ask(stream, step(0, 0, [1])), Result)
                assert not stopping.done()
                await stream.send(encode(Close()))
                await stopping

    run(main())
