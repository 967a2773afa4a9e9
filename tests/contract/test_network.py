"""What every `Network` promises of handlers, of whom it reaches, and of its own end. One suite for all worlds.

A scenario gets a world with two peers that have met, and names of its own for protocols and topics. On the simulated
side nothing here takes time; on the real side a scenario waits for events, and polls the registry with a deadline.
Streams and the registry have files of their own beside this one.
"""

import asyncio

import pytest

from llmasos.config import CONNECT_TIMEOUT_S
from llmasos.errors import ConnectionLostError, PeerTimeoutError, SwarmUnreachableError, UsageError
from llmasos.identity import Identity
from llmasos.network import Stream, call
from llmasos.wire import Contact
from tests.contract.worlds import (
    Play,
    World,
    echo,
    eventually,
    silent,
)

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
        streams: list[Stream] = []

        async def five_are_open() -> bool:
            """One after the other; those of the test before may still count."""
            stream = await world.a.connect(world.b.contact, world.protocol)
            try:
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            except ConnectionLostError:
                await stream.close()
            else:
                streams.append(stream)
            return len(streams) == 5

        await eventually(five_are_open)
        crowded = await world.a.connect(world.b.contact, world.protocol)
        with pytest.raises(ConnectionLostError):
            await crowded.receive()
        for stream in streams:  # the others go on
            await stream.send(b"x")
            assert await stream.receive() == b"x"
        await streams.pop().close()  # and one that ends makes room
        await eventually(five_are_open)
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
