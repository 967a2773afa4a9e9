"""Frames on raw bytes, however they arrive."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.config import MAX_FRAME_BYTES
from llmasos.errors import ConnectionLostError
from llmasos.p2p_stream import END, FrameStream


class FakeTransport(asyncio.Transport):
    """Keeps what is written; may be paused."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.reading = True
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def writelines(self, parts: Any) -> None:
        self.written += b"".join(parts)

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True


def frame_stream() -> tuple[FrameStream, FakeTransport]:
    stream, transport = FrameStream(greeted=True), FakeTransport()
    stream.connection_made(transport)
    return stream, transport


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 50), st.binary(max_size=130))
def test_frames_are_cut_alike_however_their_bytes_arrive(frames: list[bytes], step: int, hello: bytes) -> None:
    async def main() -> None:
        writer, written = frame_stream()
        for frame in frames:
            await writer.send(frame)
        await writer.close()
        size = len(hello)
        prefix = bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])
        data = prefix + hello + bytes(written.written)
        reader, transport = FrameStream(), FakeTransport()
        reader.connection_made(transport)
        for start in range(0, len(data), step):
            reader.data_received(data[start : start + step])
        assert await reader.hello == hello
        assert [await reader.receive() for _ in frames] == frames
        with pytest.raises(ConnectionLostError, match="the stream ended"):
            await reader.receive()
        assert transport.aborted

    asyncio.run(main())


async def test_a_frame_over_the_limit_ends_the_stream_before_it_takes_memory() -> None:
    stream, transport = frame_stream()
    stream.data_received((3).to_bytes(4, "big") + b"yes" + (MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x" * 100)
    assert await stream.receive() == b"yes"
    with pytest.raises(ConnectionLostError, match="announced a frame of 67108865 bytes"):
        await stream.receive()
    assert transport.aborted
    assert not stream._buffer


async def test_reading_pauses_while_nobody_receives() -> None:
    stream, transport = frame_stream()
    frame = (400_000).to_bytes(4, "big") + bytes(400_000)
    stream.data_received(frame * 3)
    assert not transport.reading
    await stream.receive()
    assert transport.reading
    stream.data_received(frame * 3)
    assert not transport.reading
    await stream.close()
    assert transport.reading, "a closed end drains the other, or that one would not get to the end mark"
    assert transport.written == END


async def test_a_closed_stream_lingers_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.p2p_stream.LINGER_S", 0.01)
    stream, transport = frame_stream()
    await stream.close()
    assert not transport.aborted
    await asyncio.sleep(0.05)
    assert transport.aborted


@pytest.mark.parametrize("hello", [b"\xff\xff\xff\xff\xff\xff", b"\xff\xff\x7f"])
async def test_an_absurd_hello_is_hung_up_on(hello: bytes) -> None:
    stream, transport = FrameStream(), FakeTransport()
    stream.connection_made(transport)
    stream.data_received(hello)
    assert transport.aborted
    stream.connection_lost(None)
    with pytest.raises(ConnectionLostError):
        await stream.hello
