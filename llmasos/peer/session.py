"""One session on one peer: what it may compute, where its rows come from and where they go.

Every step is computed once. What it became stays in two records: the rows by their position, for as long as the session
lives, so that another peer can be brought up to date; and the latest outputs by the number of their step, so that a
step that comes again is answered as it was the first time.
"""

import asyncio
import logging
from collections import OrderedDict
from typing import NamedTuple

from msgspec import UNSET

from llmasos.codec import pack, unpack
from llmasos.config import MAX_PENDING_TOKENS, PREFIX_PAGE_TOKENS, RECORDED_STEPS, SESSION_LEASE_S
from llmasos.errors import ConnectionLostError, short_id
from llmasos.history import History
from llmasos.network import Network, Stream
from llmasos.peer.engine import Engine
from llmasos.peer.link import Link, Outbox
from llmasos.peer.prefixes import Prefix
from llmasos.peer.runner import Fault
from llmasos.peer.scheduler import GapError, KvFullError
from llmasos.span import Span
from llmasos.tasks import TaskSet
from llmasos.wire import (
    MAX_MESSAGE_CHARS,
    MAX_TRAIL,
    AnyMessage,
    ErrorCode,
    Failed,
    NextHop,
    Open,
    Ping,
    Pong,
    Replay,
    Reroute,
    Result,
    Spent,
    Step,
    Tensor,
    Trail,
    encode,
)

log = logging.getLogger(__name__)


class _Output(NamedTuple):
    """The rows that a step became, packed as they are sent, and what the step said about them."""

    step: int
    position: int
    keep: int
    replay: int
    rows: Tensor
    spent: Trail


class PeerSession:
    """Takes steps in, hands them to the engine, and sends what comes out to the next hop or the client.

    Failures are always told to the client, whoever sent the step. `close()` must be awaited at the end.
    """

    def __init__(
        self,
        key: str,
        request: Open,
        client: Stream,
        network: Network,
        engine: Engine,
        prefix: Prefix | None = None,
    ) -> None:
        self.key = key
        self.span = Span(request.start, request.end)
        self.upstream = request.upstream
        self._traced = request.trace
        self._codec = request.codec
        self._client = client
        self._network = network
        self._engine = engine
        self._outputs = prefix.outputs if prefix is not None else History()
        self._to_keep = request.prefix  # until their rows have been computed
        self._record: OrderedDict[int, _Output] = OrderedDict()
        self._recorded_rows = 0
        self._most_recorded_rows = request.tokens + MAX_PENDING_TOKENS  # what is rolled back adds up otherwise
        self._last_step = -1
        self._wanted_from = 0  # steps below this are no longer waited for: the client has rerouted since
        self._room = asyncio.Event()
        self._upstream_streams: dict[Stream, None] = {}
        self._closed = False
        self._tasks = TaskSet()
        self._answers = Outbox(self._tell_client, self._room.set)
        self._tasks.spawn(self._answer_client(), f"answers of session {key}")
        self._relay = request.relay
        self._link: Link | None = None
        self._link_task: asyncio.Task[None] | None = None
        self._link_to(request.downstream)

    def attach(self, stream: Stream) -> None:
        """A stream of the previous hop; it ends when the session does."""
        self._upstream_streams[stream] = None

    def detach(self, stream: Stream) -> None:
        """That stream has ended."""
        self._upstream_streams.pop(stream, None)

    def tell(self, message: AnyMessage) -> None:
        """Send the client a message, behind those that wait already."""
        self._answers.put(message)

    def pong(self, ping: Ping) -> Pong:
        """The answer to a ping of the client."""
        return Pong(
            nonce=ping.nonce,
            padding=ping.padding,
            accepted=self._last_step if self._last_step >= 0 else None,
            passed=self._link.passed if self._link is not None else None,
            queued=self._engine.scheduler.queued_tokens_of(self.key),
        )

    async def accept(self, step: Step) -> None:
        """Queue a step; a repeated one is answered from the record. Waits while too much of the session is under way.

        Raises TimeoutError when nothing of it moves for a lease: nobody takes what we send.
        """
        await self._have_room()
        if self._closed:
            return
        if step.step <= self._last_step:
            known = self._record.get(step.step)
            if known is not None:
                self._send(known)
            return  # else it is under way, or so old that nobody waits for it any more
        self._last_step = step.step
        if not step.hidden.tokens:
            self._fail(step.step, "bad_request", "a step has at least one row")
            return
        number, position, keep, replay = step.step, step.position, step.keep, step.replay

        before = (step.spent or ())[: MAX_TRAIL - 1]

        def done(rows: Tensor | Fault, spent: Spent) -> None:
            if isinstance(rows, Fault):
                self._fail(number, "bad_request" if rows.sender else "fault", rows.message)
            else:
                trail = (*before, spent) if self._traced else UNSET
                self._finish(_Output(number, position, keep, replay, pack(rows, self._codec), trail))
            self._room.set()

        try:
            answered = keep > 0 and self.upstream is None and self._link is None and not self._relay
            hidden = self._plain(step.hidden)
            self._engine.submit(self.key, self.span, number, position, hidden, done, answered=answered)
        except GapError as error:
            self._fail(number, "bad_request", str(error))
        except KvFullError as error:
            self._fail(number, "refused", str(error))

    def reroute(self, change: Reroute) -> None:
        """The client has put other peers beside this one, and waits for none of the steps that are under way."""
        self.upstream = change.upstream
        self._relay = change.relay
        self._wanted_from = self._last_step + 1
        self._engine.abandon(self.key)
        self._link_to(change.downstream)
        self._room.set()

    async def replay(self, request: Replay) -> None:
        """Send the next hop (or the client, if it relays) what that has to catch up with. Waits as `accept` does."""
        await self._have_room()
        if request.until > self._outputs.length:
            message = f"asked to replay {request.until} rows of {self._outputs.length}"
            self._fail(request.step, "bad_request", message)
            return
        chunks = enumerate(self._outputs.copy().chunks(0, request.until, request.chunk), start=request.step)
        if self._link is None:
            self._answers.put_later(Result(step=number, hidden=rows) for number, (_, rows) in chunks)
            return
        self._link.outbox.put_later(
            Step(step=number, position=position, keep=0, hidden=rows, replay=request.hops)
            for number, (position, rows) in chunks
        )

    async def hang_up(self) -> None:
        """End the client's stream, and with it the session."""
        await self._client.close()

    async def close(self) -> None:
        """Free what the session holds here."""
        self._closed = True
        self._engine.release(self.key)
        self._room.set()
        await self._tasks.close()
        for stream in list(self._upstream_streams):
            await stream.close()
        # What is left points to itself in circles: without this the rows would stay until Python looks for such.
        self._link = self._link_task = None
        self._outputs = History()
        self._record.clear()

    async def _have_room(self) -> None:
        """Wait until not too much is under way. Raises TimeoutError when none of it moves for a lease."""
        while self._rows_under_way > MAX_PENDING_TOKENS:
            self._room.clear()
            async with asyncio.timeout(SESSION_LEASE_S):
                await self._room.wait()

    def _plain(self, rows: Tensor) -> Tensor:
        """The rows as the engine takes them. Those of another width it refuses, so that they need not be unpacked."""
        return rows if rows.codec == "exact" or rows.hidden != self._engine.runner.hidden_size else unpack(rows)

    # --- what the engine made of a step ----------------------------------------------------------------------------

    @property
    def _rows_under_way(self) -> int:
        """Rows that are queued, computed or not; a message without rows counts as one."""
        linked = self._link.outbox.rows if self._link is not None else 0
        return self._engine.scheduler.queued_tokens_of(self.key) + linked + self._answers.rows

    def _finish(self, output: _Output) -> None:
        self._outputs.write(output.position, output.rows)
        if self._to_keep and self._outputs.length >= len(self._to_keep) * PREFIX_PAGE_TOKENS:
            self._engine.keep_prefix(self._client.peer, self.span, self._to_keep, self.key, self._outputs)
            self._to_keep = ()
        self._record[output.step] = output
        self._recorded_rows += output.rows.tokens
        while len(self._record) > RECORDED_STEPS or self._recorded_rows > self._most_recorded_rows:
            self._recorded_rows -= self._record.popitem(last=False)[1].rows.tokens
        if output.step >= self._wanted_from:
            self._send(output)

    def _fail(self, step: int, code: ErrorCode, message: str) -> None:
        self.tell(Failed(code=code, message=message[:MAX_MESSAGE_CHARS], step=step))

    # --- sending ---------------------------------------------------------------------------------------------------

    def _send(self, output: _Output) -> None:
        """To the next hop; to the client where there is none, or where a replay ends."""
        rows, replay = output.rows, output.replay
        if self._link is not None and replay != 1:
            self._link.outbox.put(
                Step(
                    step=output.step,
                    position=output.position,
                    keep=output.keep,
                    hidden=rows,
                    replay=max(replay - 1, 0),
                    spent=output.spent,
                )
            )
            return
        if not self._relay or replay == 1:
            rows = rows.rows(max(rows.tokens - output.keep, 0), rows.tokens)
        self.tell(Result(step=output.step, hidden=rows, spent=output.spent))

    def _link_to(self, target: NextHop | None) -> None:
        """Send onward to `target` from now on. What waits on the way to another one is dropped."""
        if self._link_task is not None:
            self._link_task.cancel()
        self._link, self._link_task = None, None
        if target is not None:
            self._link = Link(self._network, target, self._room.set, self._report_unsent)
            self._link_task = self._tasks.spawn(self._link.serve(), f"link of session {self.key}")

    def _report_unsent(self, step: Step, error: ConnectionLostError) -> None:
        message = f"cannot reach {short_id(error.peer)}: {error.reason}"[:MAX_MESSAGE_CHARS]
        self.tell(Failed(code="next_hop_lost", message=message, step=step.step, peer=error.peer))

    async def _tell_client(self, message: AnyMessage) -> None:
        await self._client.send(encode(message))

    async def _answer_client(self) -> None:
        try:
            await self._answers.serve()
        except ConnectionLostError:
            log.debug("the client of session %s has gone", self.key)
