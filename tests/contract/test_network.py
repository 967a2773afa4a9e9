"""What every `Network` promises. One suite: memory and virtual time; the same behind injected links; libp2p and a DHT.

A scenario gets a world with two peers that have met, and names of its own for protocols and topics. On the simulated
side nothing here takes time; on the real side a scenario waits for events, and polls the registry with a deadline.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

import pytest
import uvloop

from llmasos.config import CONNECT_TIMEOUT_S, MAX_FRAME_BYTES, MAX_LEASE_S, MAX_RECORD_BYTES, NetworkConfig
from llmasos.errors import ConnectionLostError, PeerTimeoutError, SwarmUnreachableError, UsageError
from llmasos.identity import Identity
from llmasos.network import Network, Stream, call
from llmasos.p2p import P2PNetwork
from llmasos.wire import Contact
from sim.links import LinkedNetwork, Links
from sim.loop import run
from sim.network import SimNetwork, SimSwarm
from sim.stream import Link

_numbers = itertools.count()


class World(Protocol):
    a: Any
    b: Any
    protocol: str
    topic: str

    async def network(self, *, listen: bool = True) -> Any:
        """One more peer, which has joined."""

    def kill(self, network: Any) -> None:
        """Its process dies."""


class SimWorld:
    def __init__(self) -> None:
        self.protocol, self.topic = "contract/1", "contract"
        self.swarm = SimSwarm(seed=7)
        self.a, self.b = self.swarm.network("a"), self.swarm.network("b")

    async def network(self, *, listen: bool = True) -> Any:
        return self.swarm.network(f"more {next(_numbers)}", listen=listen)

    def kill(self, network: SimNetwork) -> None:
        self.swarm.kill(network.peer_id)


class LinkedWorld(SimWorld):
    """The same, each member behind links of its own."""

    LINKS = Links(Link(latency_s=0.007, bytes_per_s=50e6))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = self._linked(self.a), self._linked(self.b)

    def _linked(self, network: SimNetwork) -> LinkedNetwork:
        return LinkedNetwork(network, self.LINKS, asyncio.get_running_loop().time)

    async def network(self, *, listen: bool = True) -> Any:
        return self._linked(await super().network(listen=listen))


class P2PWorld:
    """One event loop and two peers for the whole module; further peers live for one scenario."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.a: P2PNetwork = self.runner.run(P2PNetwork.create(NetworkConfig()))
        self.b: P2PNetwork = self.runner.run(P2PNetwork.create(NetworkConfig()))
        self.runner.run(self.b.join([self.a.multiaddr]))
        self.more: list[P2PNetwork] = []

    async def network(self, *, listen: bool = True) -> P2PNetwork:
        self.more.append(await P2PNetwork.create(NetworkConfig(listen=listen)))
        await self.more[-1].join([self.a.multiaddr])
        return self.more[-1]

    def kill(self, network: P2PNetwork) -> None:
        network._daemon._child.kill()

    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        self.protocol, self.topic = f"contract/{next(_numbers)}", f"contract {next(_numbers)}"

        async def guarded() -> None:
            try:
                async with asyncio.timeout(30):
                    await scenario(self)
            finally:
                while self.more:
                    await self.more.pop().close()

        self.runner.run(guarded())

    def close(self) -> None:
        self.runner.run(self.b.close())
        self.runner.run(self.a.close())
        self.runner.close()


@pytest.fixture(scope="module")
def p2p_world() -> Iterator[P2PWorld]:
    world = P2PWorld()
    yield world
    world.close()


Play = Callable[[Callable[[World], Awaitable[None]]], None]


@pytest.fixture(params=["sim", "linked", pytest.param("p2p", marks=pytest.mark.swarm)])
def play(request: pytest.FixtureRequest) -> Play:
    """Plays a scenario in a world of either kind."""
    if request.param == "p2p":
        return request.getfixturevalue("p2p_world").run

    def play_sim(scenario: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            await scenario(SimWorld() if request.param == "sim" else LinkedWorld())

        run(main())

    return play_sim


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def silent(stream: Stream) -> None:
    await asyncio.Event().wait()


async def open_pair(world: World) -> tuple[Stream, Stream]:
    """A stream from a to b: a's end, and b's end out of its handler, which keeps it open."""
    accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def hand_out(stream: Stream) -> None:
        accepted.put_nowait(stream)
        await asyncio.Event().wait()

    world.b.serve(world.protocol, hand_out)
    ours = await world.a.connect(world.b.contact, world.protocol)
    return ours, await accepted.get()


async def eventually(found: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not await found():  # noqa: ASYNC110 - what others have stored tells nobody when it is there
            await asyncio.sleep(0.05)


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2_300, 1_000_000, MAX_FRAME_BYTES])
def test_a_frame_of_any_size_comes_back_as_it_was(play: Play, size: int) -> None:
    async def scenario(world: World) -> None:
        world.b.serve(world.protocol, echo)
        stream = await world.a.connect(world.b.contact, world.protocol)
        await stream.send(pattern(size))
        assert await stream.receive() == pattern(size)
        await stream.close()

    play(scenario)


def test_a_frame_over_the_limit_is_refused_and_the_stream_goes_on(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.b.serve(world.protocol, echo)
        stream = await world.a.connect(world.b.contact, world.protocol)
        with pytest.raises(UsageError, match="over the limit"):
            await stream.send(bytes(MAX_FRAME_BYTES + 1))
        await stream.send(b"small")
        assert await stream.receive() == b"small"
        await stream.close()

    play(scenario)


def test_frames_arrive_in_the_order_they_were_sent(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)
        sizes = [(number * 7_919) % 20_011 for number in range(300)]

        async def send_all() -> None:
            for size in sizes:
                await ours.send(pattern(size))

        async with asyncio.TaskGroup() as group:
            group.create_task(send_all())
            received = [len(await theirs.receive()) for _ in sizes]
        assert received == sizes
        await ours.close()

    play(scenario)


def test_both_directions_are_busy_at_once(play: Play) -> None:
    async def scenario(world: World) -> None:
        ends = await open_pair(world)

        async def send_all(stream: Stream, mark: bytes) -> None:
            for _ in range(60):
                await stream.send(mark * 65_537)

        async def receive_all(stream: Stream, mark: bytes) -> None:
            for _ in range(60):
                assert await stream.receive() == mark * 65_537

        async with asyncio.TaskGroup() as group:
            for end, sent, got in zip(ends, (b"a", b"b"), (b"b", b"a"), strict=True):
                group.create_task(send_all(end, sent))
                group.create_task(receive_all(end, got))
        await ends[0].close()

    play(scenario)


def test_frames_of_several_senders_are_not_mixed(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)
        async with asyncio.TaskGroup() as group:
            for mark in range(12):
                group.create_task(ours.send(bytes([mark]) * 300_007))
            received = [await theirs.receive() for _ in range(12)]
        assert sorted(frame[0] for frame in received) == list(range(12))
        assert all(frame == frame[:1] * 300_007 for frame in received)
        await ours.close()

    play(scenario)


def test_a_sender_waits_while_nobody_reads(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)
        sent = 0

        async def send_for_ever() -> None:
            nonlocal sent
            while True:
                await ours.send(bytes(250_000))
                sent += 1

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(send_for_ever(), 1.0)
        assert 1 <= sent <= 40  # megabytes under way, not whatever the sender has
        for _ in range(sent):
            await theirs.receive()
        await ours.close()

    play(scenario)


def test_a_cancelled_receive_loses_nothing(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await ours.receive()
        await theirs.send(pattern(500_000))
        for _ in range(100):  # and again while the frame comes in
            try:
                async with asyncio.timeout(0.0005):
                    frame = await ours.receive()
                break
            except TimeoutError:
                continue
        else:
            frame = await ours.receive()
        assert frame == pattern(500_000)
        await ours.close()

    play(scenario)


# --- who, and the end ------------------------------------------------------------------------------------------------


def test_each_end_knows_who_the_other_is(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)
        assert ours.peer == world.b.peer_id == world.b.contact.peer
        assert theirs.peer == world.a.peer_id
        assert world.a.peer_id != world.b.peer_id
        await ours.close()

    play(scenario)


def test_what_was_sent_before_a_close_arrives_and_then_the_end(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)
        await ours.send(pattern(400_000))  # never read: closing with unread input must not cost the answer
        for number in range(3):
            await theirs.send(bytes([number]) * 100_003)
        await theirs.close()
        assert [(await ours.receive())[0] for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(ConnectionLostError) as caught:
                await ours.receive()
            assert caught.value.peer == world.b.peer_id
        await ours.close()

    play(scenario)


def test_a_sender_that_never_receives_notices_the_end(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)
        await theirs.close()

        async def send_for_ever() -> None:
            while True:
                await ours.send(b"step")
                await asyncio.sleep(0.01)

        with pytest.raises(ConnectionLostError):
            async with asyncio.timeout(2):
                await send_for_ever()
        await ours.close()

    play(scenario)


def test_a_blocked_sender_and_a_waiting_reader_are_freed_by_the_end(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)

        async def send_for_ever() -> None:
            while True:
                await ours.send(bytes(500_000))

        sender = asyncio.create_task(send_for_ever())
        reader = asyncio.create_task(ours.receive())
        await asyncio.sleep(0.5)
        assert not sender.done()
        await theirs.close()
        for task in (sender, reader):
            with pytest.raises(ConnectionLostError):
                await asyncio.wait_for(task, 5)
        await ours.close()

    play(scenario)


def test_close_may_be_called_twice_and_ends_this_end_at_once(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, theirs = await open_pair(world)
        await theirs.send(b"unread")
        await ours.close()
        await ours.close()
        with pytest.raises(ConnectionLostError):
            await ours.receive()
        with pytest.raises(ConnectionLostError):
            await ours.send(b"late")
        with pytest.raises(ConnectionLostError):
            await theirs.receive()
        await theirs.close()

    play(scenario)


def test_a_reader_of_its_own_end_is_freed_by_close(play: Play) -> None:
    async def scenario(world: World) -> None:
        ours, _ = await open_pair(world)
        reader = asyncio.create_task(ours.receive())
        await asyncio.sleep(0.01)
        await ours.close()
        with pytest.raises(ConnectionLostError):
            await asyncio.wait_for(reader, 1)

    play(scenario)


# --- handlers --------------------------------------------------------------------------------------------------------


def test_a_failing_handler_costs_its_own_stream_only(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        async def fails_on_bad(stream: Stream) -> None:
            while True:
                frame = await stream.receive()
                if frame == b"bad":
                    raise ZeroDivisionError("bad frame")
                await stream.send(frame)

        world.b.serve(world.protocol, fails_on_bad)
        good = await world.a.connect(world.b.contact, world.protocol)
        bad = await world.a.connect(world.b.contact, world.protocol)
        await bad.send(b"bad")
        with pytest.raises(ConnectionLostError):
            await bad.receive()
        await good.send(b"good")
        assert await good.receive() == b"good"
        await good.close()

    play(scenario)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "ZeroDivisionError: bad frame" in errors[0]


def test_a_stream_ends_when_its_handler_returns(play: Play) -> None:
    async def scenario(world: World) -> None:
        async def once(stream: Stream) -> None:
            await stream.send(await stream.receive())

        world.b.serve(world.protocol, once)
        stream = await world.a.connect(world.b.contact, world.protocol)
        await stream.send(b"ping")
        assert await stream.receive() == b"ping"
        with pytest.raises(ConnectionLostError):
            await stream.receive()

    play(scenario)


def test_a_handler_may_speak_first(play: Play) -> None:
    async def scenario(world: World) -> None:
        async def greet(stream: Stream) -> None:
            await stream.send(b"welcome")

        world.b.serve(world.protocol, greet)
        for _ in range(5):
            stream = await world.a.connect(world.b.contact, world.protocol)
            async with asyncio.timeout(2):
                assert await stream.receive() == b"welcome"
            await stream.close()
            await asyncio.sleep(0.05)  # libp2p peers learn what each other serves, and then open streams lazily

    play(scenario)


def test_many_streams_between_two_peers_are_independent(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.b.serve(world.protocol, echo)

        async def talk(number: int) -> None:
            stream = await world.a.connect(world.b.contact, world.protocol)
            for turn in range(5):
                await stream.send(f"{number}.{turn}".encode())
                assert await stream.receive() == f"{number}.{turn}".encode()
            await stream.close()

        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(talk(number))

    play(scenario)


def test_one_peer_cannot_take_all_streams(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.p2p.MAX_STREAMS_PER_PEER", 5)
    monkeypatch.setattr("sim.network.MAX_STREAMS_PER_PEER", 5)

    async def scenario(world: World) -> None:
        world.b.serve(world.protocol, echo)
        streams = [await world.a.connect(world.b.contact, world.protocol) for _ in range(5)]
        for stream in streams:  # streams opened one after the other may arrive in any order
            await stream.send(b"x")
            assert await stream.receive() == b"x"
        crowded = await world.a.connect(world.b.contact, world.protocol)
        with pytest.raises(ConnectionLostError):
            await crowded.receive()
        for stream in streams:  # the others go on
            await stream.send(b"x")
            assert await stream.receive() == b"x"
        await streams.pop().close()  # and one that ends makes room

        async def fits() -> bool:
            stream = await world.a.connect(world.b.contact, world.protocol)
            try:
                await stream.send(b"x")
                return await stream.receive() == b"x"
            except ConnectionLostError:
                return False
            finally:
                await stream.close()

        await eventually(fits)
        for stream in streams:
            await stream.close()

    play(scenario)


def test_a_peer_reaches_itself(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.a.serve(world.protocol, echo)
        assert await call(world.a, world.a.contact, world.protocol, b"hello", 2) == b"hello"
        with pytest.raises(ConnectionLostError):
            await world.a.connect(world.a.contact, "never served/1")

    play(scenario)


def test_a_client_that_does_not_listen_can_call(play: Play) -> None:
    async def scenario(world: World) -> None:
        client = await world.network(listen=False)
        assert client.contact.addresses == ()
        world.b.serve(world.protocol, echo)
        assert await call(client, world.b.contact, world.protocol, b"hello", 5) == b"hello"
        assert await client.publish(world.topic, b"seen", 20)
        assert (await world.b.lookup(world.topic))[client.peer_id].value == b"seen"

    play(scenario)


# --- what cannot be reached ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "whom", ["unserved", "unknown", "unknown at a dead address", "someone else's address", "not an id"]
)
def test_connecting_to_what_is_not_there_fails_in_time(play: Play, whom: str) -> None:
    async def scenario(world: World) -> None:
        stranger = Identity.generate().peer_id
        contact = {
            "unserved": world.b.contact,
            "unknown": Contact(stranger),
            "unknown at a dead address": Contact(stranger, ("/ip4/127.0.0.1/tcp/9",)),
            "someone else's address": Contact(stranger, world.b.contact.addresses),
            "not an id": Contact("nobody", world.b.contact.addresses),
        }[whom]
        started_at = asyncio.get_running_loop().time()
        with pytest.raises(ConnectionLostError) as caught:
            await world.a.connect(contact, "never served/1")
        assert caught.value.peer == contact.peer
        assert asyncio.get_running_loop().time() - started_at < CONNECT_TIMEOUT_S + 0.5

    play(scenario)


def test_when_a_peer_is_killed_its_streams_end_and_it_knows_itself(play: Play) -> None:
    async def scenario(world: World) -> None:
        victim = await world.network()
        victim.serve(world.protocol, silent)
        stream = await world.a.connect(victim.contact, world.protocol)
        assert not victim.failed.is_set()
        world.kill(victim)
        with pytest.raises(ConnectionLostError) as caught:
            async with asyncio.timeout(2):
                await stream.receive()
        assert caught.value.peer == victim.peer_id
        with pytest.raises(ConnectionLostError):
            await world.a.connect(victim.contact, world.protocol)
        async with asyncio.timeout(2):
            await victim.failed.wait()
        for operation in (
            victim.connect(world.a.contact, world.protocol),
            victim.publish(world.topic, b"x", 1),
            victim.lookup(world.topic),
            victim.join(["/ip4/127.0.0.1/tcp/9/p2p/" + world.a.peer_id]),
        ):
            with pytest.raises(ConnectionLostError) as caught:
                await operation
            assert caught.value.peer == victim.peer_id
        await victim.close()

    play(scenario)


def test_a_closed_network_has_ended_its_handlers_and_streams(play: Play) -> None:
    async def scenario(world: World) -> None:
        leaver = await world.network()
        ended = asyncio.Event()

        async def until_cancelled(stream: Stream) -> None:
            try:
                await stream.send(b"here")
                await asyncio.Event().wait()
            finally:
                ended.set()

        leaver.serve(world.protocol, until_cancelled)
        stream = await world.a.connect(leaver.contact, world.protocol)
        assert await stream.receive() == b"here"
        await leaver.close()
        await leaver.close()
        assert ended.is_set()
        with pytest.raises(ConnectionLostError):
            await stream.receive()
        with pytest.raises(ConnectionLostError):
            await leaver.lookup(world.topic)

    play(scenario)


def test_call_has_a_deadline(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.b.serve(world.protocol, silent)
        with pytest.raises(PeerTimeoutError) as caught:
            await call(world.a, world.b.contact, world.protocol, b"anybody?", 0.3)
        assert caught.value.peer == world.b.peer_id

    play(scenario)


def test_joining(play: Play) -> None:
    async def scenario(world: World) -> None:
        await world.a.join([])
        await world.a.join([world.a.multiaddr])  # itself: ignored
        await world.a.join([world.b.multiaddr])
        await world.a.join([world.b.multiaddr])
        dead = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
        await world.a.join([dead, world.b.multiaddr])  # one that answers is enough
        for wrong in ("", "nonsense", world.b.contact.addresses[0], dead + "x", "/ip4/1.2.3.4/udp/9/p2p/" + dead[-52:]):
            with pytest.raises(UsageError) as caught:
                await world.a.join([wrong])
            assert repr(wrong) in caught.value.message
            assert "/p2p/12D3Koo" in caught.value.hint

    play(scenario)


def test_joining_nobody_fails_and_names_the_addresses(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.p2p.JOIN_TIMEOUT_S", 2.0)

    async def scenario(world: World) -> None:
        dead = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
        started_at = asyncio.get_running_loop().time()
        with pytest.raises(SwarmUnreachableError, match=dead):
            await world.a.join([dead])
        assert asyncio.get_running_loop().time() - started_at < 12

    play(scenario)


# --- the registry ----------------------------------------------------------------------------------------------------


def test_an_unknown_topic_is_empty(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert await world.a.lookup(world.topic) == {}

    play(scenario)


def test_what_one_publishes_all_find_under_its_name(play: Play) -> None:
    async def scenario(world: World) -> None:
        before = world.a.now()
        assert await world.a.publish(world.topic, b"\x00first\xff", 20)
        for reader in (world.a, world.b):
            found = await reader.lookup(world.topic)
            assert list(found) == [world.a.peer_id]
            entry = found[world.a.peer_id]
            assert (entry.peer, entry.value) == (world.a.peer_id, b"\x00first\xff")
            assert before + 20 <= entry.expires_at <= world.a.now() + 20
        assert await world.a.lookup(world.topic + "?") == {}

    play(scenario)


def test_a_later_value_replaces_the_earlier_even_with_a_shorter_lease(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert await world.a.publish(world.topic, b"online", 60)
        assert (await world.b.lookup(world.topic))[world.a.peer_id].value == b"online"
        assert await world.a.publish(world.topic, b"offline", 20)
        assert (await world.b.lookup(world.topic))[world.a.peer_id].value == b"offline"

    play(scenario)


def test_a_value_is_gone_when_its_lease_ends(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert await world.a.publish(world.topic, b"short", 1.0)
        assert await world.b.publish(world.topic, b"long", 30.0)
        published_at = world.b.now()
        assert len(await world.b.lookup(world.topic)) == 2

        async def only_the_long_one() -> bool:
            return list(await world.b.lookup(world.topic)) == [world.b.peer_id]

        await eventually(only_the_long_one, within_s=3)
        assert world.b.now() - published_at > 0.9

    play(scenario)


def test_every_peer_has_its_place_under_one_topic(play: Play) -> None:
    async def scenario(world: World) -> None:
        networks: list[Network] = [world.a, world.b, *[await world.network() for _ in range(4)]]
        async with asyncio.TaskGroup() as group:
            for number, network in enumerate(networks):
                group.create_task(network.publish(world.topic, bytes([number]), 20))
        for reader in networks:
            found = await reader.lookup(world.topic)
            assert {peer: entry.value for peer, entry in found.items()} == {
                network.peer_id: bytes([number]) for number, network in enumerate(networks)
            }

    play(scenario)


def test_a_record_of_the_largest_size_fits(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert await world.a.publish(world.topic, pattern(MAX_RECORD_BYTES), MAX_LEASE_S)
        assert (await world.b.lookup(world.topic))[world.a.peer_id].value == pattern(MAX_RECORD_BYTES)

    play(scenario)


def test_what_no_registry_would_take_is_a_usage_error(play: Play) -> None:
    async def scenario(world: World) -> None:
        for topic, value, lease_s in (
            ("", b"x", 1.0),
            ("t" * 300, b"x", 1.0),
            ("t", bytes(MAX_RECORD_BYTES + 1), 1.0),
            ("t", b"x", MAX_LEASE_S + 1),
            ("t", b"x", 0.0),
            ("t", b"x", float("nan")),
        ):
            with pytest.raises(UsageError):
                await world.a.publish(topic, value, lease_s)

    play(scenario)
