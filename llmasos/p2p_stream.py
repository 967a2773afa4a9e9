"""Frames on a byte stream: `Stream` of `llmasos.network` over one socket to the p2p daemon.

    stream = hello OPEN? frame* END    hello = varint length, protobuf (who is there; from the daemon)
    frame  = u32 length, bytes         OPEN  = ff ff ff fe    END = ff ff ff ff

libp2p tells the other side of a new stream only when something is written to it (measured): who opens a stream writes
OPEN at once, or a handler that speaks first would never be called.

A libp2p stream that is closed while the other side still writes is reset, and what was under way in either direction
may be lost (measured). So a close is said in band: after END nothing more is sent, what still comes in is thrown
away, and the socket stays until the other side, having read up to END, closes it, or LINGER_S has passed.

Reading goes on while nobody receives, up to READ_AHEAD_BYTES, so the end of a stream is noticed by its senders too.
"""

import asyncio
from collections import deque
from typing import cast

from llmasos.config import MAX_FRAME_BYTES
from llmasos.errors import ConnectionLostError, UsageError
from llmasos.network import PeerId

LENGTH_BYTES = 4
OPEN = b"\xff\xff\xff\xfe"
END = b"\xff\xff\xff\xff"
LINGER_S = 3.0
READ_AHEAD_BYTES = 2**20
MAX_HELLO_BYTES = 2**16


class FrameStream(asyncio.Protocol):
    """One end of a stream. `peer` is set by whoever has read the hello."""

    def __init__(self, *, greeted: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self.peer = PeerId("")
        self.protocol = ""
        self.hello: asyncio.Future[bytes] = loop.create_future()
        """What the daemon says first; ConnectionLostError if it hangs up instead."""
        self.gone: asyncio.Future[None] = loop.create_future()
        """Done when the socket is closed."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()  # the frame, or part of one, that is still coming in
        self._greeted = greeted
        self._frames: deque[bytes] = deque()
        self._queued_bytes = 0
        self._paused = False
        self._writable = True
        self._ended: str | None = None  # why, once nothing can be sent; what has arrived can still be received
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()

    # --- the contract of Stream ---

    async def send(self, frame: bytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise UsageError(f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
        if self._ended is not None or self._transport is None:
            raise self._lost()
        while not self._writable:
            waiter = self._loop.create_future()
            self._writers.append(waiter)
            await waiter
            if self._ended is not None:
                raise self._lost()
        self._transport.writelines((len(frame).to_bytes(LENGTH_BYTES, "big"), frame))

    async def receive(self) -> bytes:
        while not self._frames:
            if self._ended is not None:
                raise self._lost()
            if self._reader is not None:
                raise RuntimeError("two tasks receive on one stream")
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        frame = self._frames.popleft()
        self._queued_bytes -= len(frame)
        self._pace()
        return frame

    async def close(self) -> None:
        self.shut()

    # --- the machinery ---

    def write_raw(self, data: bytes) -> None:
        """Bytes outside of any frame: a request to the daemon before its hello, and OPEN after it."""
        assert self._transport is not None
        self._transport.write(data)

    def abort(self) -> None:
        """Drop the socket with everything in it."""
        self._end("this end was closed")
        if self._transport is not None:
            self._transport.abort()

    def shut(self) -> None:
        """Close this end; see the module."""
        over = self._ended is not None
        self._end("this end was closed")
        self._frames.clear()
        self._queued_bytes = 0
        if over or self._transport is None:
            return
        self._transport.write(END)
        self._pace()
        linger = self._loop.call_later(LINGER_S, self._transport.abort)
        self.gone.add_done_callback(lambda _: linger.cancel())

    def _lost(self) -> ConnectionLostError:
        return ConnectionLostError(self.peer, self._ended or "the stream ended")

    def _end(self, reason: str) -> None:
        if self._ended is None:
            self._ended = reason
            _wake(self._reader)
            while self._writers:
                _wake(self._writers.popleft())

    def _pace(self) -> None:
        """Let the daemon's socket fill up while the frames here are not received."""
        full = self._queued_bytes > READ_AHEAD_BYTES
        if full != self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = full
            if full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._greeted and not self._take_hello():
            return
        while self._take_frame():
            pass
        self._pace()

    def eof_received(self) -> None:
        """The daemon closed the stream; returning None closes our side of the socket."""
        self._end("the connection ended")

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the connection ended")
        if not self.hello.done():
            self.hello.set_exception(self._lost())
            self.hello.exception()  # marks it as seen: the waiter, if there still is one, gets it all the same
        if not self.gone.done():
            self.gone.set_result(None)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        while self._writers:
            _wake(self._writers.popleft())

    # --- parsing ---

    def _take_hello(self) -> bool:
        """Cut the hello off the buffer; False while it is not all there."""
        size = shift = used = 0
        for byte in self._buffer[:5]:
            size |= (byte & 0x7F) << shift
            shift += 7
            used += 1
            if byte < 0x80:
                break
        else:
            if used == 5:
                self.abort()
            return False
        if size > MAX_HELLO_BYTES:
            self.abort()
            return False
        if len(self._buffer) < used + size:
            return False
        if not self.hello.done():
            self.hello.set_result(bytes(self._buffer[used : used + size]))
        del self._buffer[: used + size]
        self._greeted = True
        return True

    def _take_frame(self) -> bool:
        """Cut one frame off the buffer; False while none is all there, or the stream is over."""
        buffer = self._buffer
        if len(buffer) < LENGTH_BYTES:
            return False
        if buffer.startswith(OPEN):
            del buffer[:LENGTH_BYTES]
            return True
        if buffer.startswith(END):
            buffer.clear()
            self._end("the stream ended")
            assert self._transport is not None
            self._transport.abort()  # the other side listens no more
            return False
        size = int.from_bytes(buffer[:LENGTH_BYTES], "big")
        if size > MAX_FRAME_BYTES:
            buffer.clear()
            self._end(f"it announced a frame of {size} bytes, over the limit of {MAX_FRAME_BYTES}")
            assert self._transport is not None
            self._transport.abort()
            return False
        end = LENGTH_BYTES + size
        if len(buffer) < end:
            return False
        if self._ended is None:
            self._frames.append(bytes(memoryview(buffer)[LENGTH_BYTES:end]))
            self._queued_bytes += size
            _wake(self._reader)
        del buffer[:end]
        return True


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
