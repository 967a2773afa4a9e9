"""The ways out of a session on a peer: to its client, and to the next hop.

What is to be sent waits in an `Outbox`, which counts it, so that a session whose messages nobody takes stops taking
steps itself. A `Link` is broken for good by its first failure: a step that came through behind one that did not would
leave a hole in the next hop's cache. The client is told of each step that is not sent, and says what is to be done.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from llmasos.config import MAX_PENDING_TOKENS, OPEN_TIMEOUT_S
from llmasos.errors import ConnectionLostError
from llmasos.network import Network, Stream
from llmasos.wire import PROTOCOL, AnyMessage, Attach, NextHop, Result, Step, encode

log = logging.getLogger(__name__)

_WITH_ROWS = (Step, Result)
LATER_ROWS = MAX_PENDING_TOKENS // 8
"""What messages count for together that are made later: what they are made of is held until then."""


class Outbox:
    """Messages that wait to be sent, in order. `serve()` must run for that; `moved` is called after each."""

    def __init__(self, send: Callable[[AnyMessage], Awaitable[None]], moved: Callable[[], None]) -> None:
        self.rows = 0
        self._send = send
        self._moved = moved
        self._waiting: deque[tuple[Iterable[AnyMessage], int]] = deque()
        self._idle: asyncio.Future[None] | None = None  # what `serve` waits for

    def put(self, message: AnyMessage) -> None:
        """Queue a message; it counts as the rows that it holds, and never as nothing."""
        self._put((message,), max(message.hidden.tokens, 1) if isinstance(message, _WITH_ROWS) else 1)

    def put_later(self, messages: Iterable[AnyMessage]) -> None:
        """Queue messages that are made when their turn comes, one after the other; see LATER_ROWS."""
        self._put(messages, LATER_ROWS)

    async def serve(self) -> None:
        """Send until cancelled, or until `send` raises."""
        while True:
            if not self._waiting:
                self._idle = asyncio.get_running_loop().create_future()
                await self._idle
            messages, rows = self._waiting.popleft()
            for message in messages:
                await self._send(message)
            self.rows -= rows
            self._moved()

    def _put(self, messages: Iterable[AnyMessage], rows: int) -> None:
        self.rows += rows
        self._waiting.append((messages, rows))
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


class Link:
    """Sends steps to `target` on a stream of its own, which is opened at once. `serve()` must run meanwhile."""

    def __init__(
        self,
        network: Network,
        target: NextHop,
        moved: Callable[[], None],
        unsent: Callable[[Step, ConnectionLostError], None],
    ) -> None:
        self.target = target
        self.passed: int | None = None  # the last step that was sent
        self.outbox = Outbox(self._push, moved)
        self._network = network
        self._unsent = unsent
        self._stream: Stream | None = None
        self._broken: ConnectionLostError | None = None

    async def serve(self) -> None:
        """Connect, and send until cancelled; then the stream ends."""
        try:
            await self._connect()
            await self.outbox.serve()
        finally:
            if self._stream is not None:
                await self._stream.close()

    async def _connect(self) -> None:
        target = self.target.contact
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                self._stream = await self._network.connect(target, PROTOCOL)
                await self._stream.send(encode(Attach(session=self.target.session)))
        except ConnectionLostError as error:
            self._broken = error
        except TimeoutError:
            self._broken = ConnectionLostError(target.peer, f"does not answer within {OPEN_TIMEOUT_S:g} s")

    async def _push(self, message: AnyMessage) -> None:
        assert isinstance(message, Step), "a link carries steps and nothing else"
        try:
            if self._broken is not None:
                raise self._broken
            assert self._stream is not None, "a link without a stream is broken"
            await self._stream.send(encode(message))
            self.passed = message.step
        except ConnectionLostError as error:
            self._broken = error
            self._unsent(message, error)
