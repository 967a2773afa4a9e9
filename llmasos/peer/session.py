"""One session on one peer: what it may compute, where its rows come from and where they go."""

import asyncio
import logging
from dataclasses import dataclass

from llmasos.config import MAX_PENDING_TOKENS
from llmasos.errors import ConnectionLostError, short_id
from llmasos.history import History
from llmasos.network import Network, Stream
from llmasos.peer.engine import Engine
from llmasos.peer.runner import Fault
from llmasos.peer.scheduler import GapError, KvFullError
from llmasos.span import Span
from llmasos.wire import (
    MAX_MESSAGE_CHARS,
    PROTOCOL,
    AnyMessage,
    Attach,
    ErrorCode,
    Failed,
    Open,
    Replay,
    Reroute,
    Result,
    Step,
    Tensor,
    encode,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Output:
    """The rows that one step became, on their way to whom they concern."""

    step: Step
    rows: Tensor


class PeerSession:
    """Takes steps in, hands them to the engine, and sends what comes out to the next hop or the client.

    `serve_outbox()` must run while the session lives. Failures are always told to the client, whoever sent the step.
    """

    def __init__(self, key: str, request: Open, client: Stream, network: Network, engine: Engine) -> None:
        self.key = key
        self.span = Span(request.start, request.end)
        self.upstream = request.upstream
        self._onward = Reroute(downstream=request.downstream, relay=request.relay)
        self._client = client
        self._network = network
        self._engine = engine
        self._outputs = History()
        self._last_step = -1
        self._last_answer: Result | None = None
        self._outbox: asyncio.Queue[AnyMessage | _Output | Replay] = asyncio.Queue()
        self._link: Stream | None = None
        self._room = asyncio.Event()
        self._session_id = request.session
        self._upstream_streams: list[Stream] = []
        self._closed = False

    def attach(self, stream: Stream) -> None:
        """A stream of the previous hop; it ends when the session does."""
        self._upstream_streams.append(stream)

    async def accept(self, step: Step) -> None:
        """Queue a step; a repeated one is answered from the record. Waits while too much of the session is queued."""
        if step.step <= self._last_step:
            if self._last_answer is not None and self._last_answer.step == step.step:
                self._outbox.put_nowait(self._last_answer)
            return
        while self._engine.scheduler.queued_tokens_of(self.key) > MAX_PENDING_TOKENS:
            self._room.clear()
            await self._room.wait()
        if self._closed:
            return
        self._last_step = step.step
        try:
            self._engine.submit(
                self.key, self.span, step.step, step.position, step.hidden, lambda rows: self._finish(step, rows)
            )
        except GapError as error:
            self._fail(step, "bad_request", str(error))
        except KvFullError as error:
            self._fail(step, "refused", str(error))

    def reroute(self, change: Reroute) -> None:
        """The client has put other peers beside this one. Output that waits already still goes the old way."""
        self.upstream = change.upstream
        self._outbox.put_nowait(change)

    def replay(self, request: Replay) -> None:
        """Send the next hop what it has to catch up with."""
        self._outbox.put_nowait(request)

    async def serve_outbox(self) -> None:
        """Send, in order, until the client is gone."""
        try:
            while True:
                match await self._outbox.get():
                    case _Output() as output:
                        await self._send_output(output.step, output.rows)
                    case Replay() as request:
                        await self._send_replay(request)
                    case Reroute() as change:
                        await self._close_link()
                        self._onward = change
                    case message:
                        await self._client.send(encode(message))
        except ConnectionLostError:
            log.debug("session %s: its client has gone", self._session_id)
        finally:
            await self._close_link()

    async def close(self) -> None:
        """Free what the session holds here."""
        self._closed = True
        self._engine.release(self.key)
        self._room.set()
        for stream in self._upstream_streams:
            await stream.close()

    # --- what the engine made of a step ----------------------------------------------------------------------------

    def _finish(self, step: Step, rows: Tensor | Fault) -> None:
        self._room.set()
        if isinstance(rows, Fault):
            self._fail(step, "bad_request" if rows.sender else "fault", rows.message)
            return
        self._outputs.write(step.position, rows)
        self._outbox.put_nowait(_Output(step, rows))

    def _fail(self, step: Step, code: ErrorCode, message: str) -> None:
        self._outbox.put_nowait(Failed(code=code, message=message[:MAX_MESSAGE_CHARS], step=step.step))

    # --- sending ---------------------------------------------------------------------------------------------------

    async def _send_output(self, step: Step, rows: Tensor) -> None:
        if self._onward.downstream is not None and step.replay != 1:
            onward = Step(
                step=step.step,
                position=step.position,
                keep=step.keep,
                hidden=rows,
                replay=max(step.replay - 1, 0),
            )
            await self._push(onward)
            return
        if not self._onward.relay or step.replay == 1:
            rows = rows.rows(max(rows.tokens - step.keep, 0), rows.tokens)
        self._last_answer = Result(step=step.step, hidden=rows)
        await self._client.send(encode(self._last_answer))

    async def _send_replay(self, request: Replay) -> None:
        if request.until > self._outputs.length:
            message = f"asked to replay {request.until} rows of {self._outputs.length}"
            await self._client.send(encode(Failed(code="bad_request", message=message, step=request.step)))
            return
        for index, (position, rows) in enumerate(self._outputs.chunks(0, request.until, request.chunk)):
            number = request.step + index
            if self._onward.downstream is None:
                await self._client.send(encode(Result(step=number, hidden=rows)))
            elif not await self._push(Step(step=number, position=position, keep=0, hidden=rows, replay=request.hops)):
                return

    async def _push(self, step: Step) -> bool:
        """Send a step to the next hop. Tells the client when that hop cannot be reached."""
        onward = self._onward.downstream
        assert onward is not None, "a hop without a next one has nothing to push to"
        try:
            if self._link is None:
                self._link = await self._network.connect(onward.contact, PROTOCOL)
                await self._link.send(encode(Attach(session=onward.session)))
            await self._link.send(encode(step))
        except ConnectionLostError as error:
            await self._close_link()
            lost = onward.contact.peer
            message = f"cannot reach {short_id(lost)}: {error.reason}"[:MAX_MESSAGE_CHARS]
            await self._client.send(encode(Failed(code="next_hop_lost", message=message, step=step.step, peer=lost)))
            return False
        return True

    async def _close_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()
