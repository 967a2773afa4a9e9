"""What every `Network` promises of streams: frames, whom they come from, and their end."""

import asyncio

import pytest

from llmasos.config import MAX_FRAME_BYTES
from llmasos.errors import ConnectionLostError, UsageError
from llmasos.network import Stream
from tests.contract.worlds import (
    Play,
    World,
    echo,
    open_pair,
    pattern,
)

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
