"""The heart of a peer: schedule, run, finish, for as long as it lives.

Sessions hand in steps and get each step's rows back through a callback, in order. Between the two stands one task; the
scheduler decides what it runs, the runner runs it.
"""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from llmasos.config import PREFIX_PAGE_TOKENS
from llmasos.history import History
from llmasos.peer.absences import Absences
from llmasos.peer.pace import Pace
from llmasos.peer.prefixes import Prefix, Prefixes
from llmasos.peer.runner import Chunk, Fault, Runner
from llmasos.peer.scheduler import Scheduler, Slice
from llmasos.peer.watcher import Watcher
from llmasos.span import Span
from llmasos.wire import MAX_COUNT, Spent, Tensor, join_rows

GATHER = 0.35
"""Of the last pass without a prompt: so long does a peer that was idle wait for the next of those who shared one. Less
keeps sessions apart that then read every weight for themselves, more costs each of them that time on every hop."""
WORTH_WAITING = 0.5
"""Of a pass over prompts: who decodes and is due back within that share of it would have to wait for the rest."""

Done = Callable[[Tensor | Fault, Spent], None]


class _Pending(msgspec.Struct):
    """A step whose rows have not all run, and what came of those that have."""

    span: Span
    hidden: Tensor
    done: Done
    came_at: float
    computed_s: float = 0.0
    parts: list[Tensor] = msgspec.field(default_factory=list)

    def spent(self, now: float) -> Spent:
        """How long it waited and was computed, in microseconds; what a clock that was set makes of it fits the wire."""
        waited_s = max(now - self.came_at - self.computed_s, 0.0)
        return min(round(1e6 * waited_s), MAX_COUNT), min(round(1e6 * self.computed_s), MAX_COUNT)


class Engine:
    """Runs the steps of all sessions in shared passes. `serve()` must run for anything to happen.

    `clock` measures what steps and passes take: the event loop's own may count whole milliseconds.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, clock: Callable[[], float], watcher: Watcher | None = None
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.prefixes = Prefixes(runner, scheduler)
        self._clock = clock
        self._watcher = watcher or Watcher()
        self.passes = 0
        self.rows = 0
        self._pending: dict[tuple[str, int], _Pending] = {}
        self._running: set[str] = set()
        self._leaving: set[str] = set()
        self._pace: Pace | None = None
        self._absences = Absences()
        self._decode_pass_s = 0.0  # how long the last pass without a prompt took
        self._prompt_pass_s = 0.0  # how long the last pass with a prompt took
        self._idle: asyncio.Future[None] | None = None  # what `serve` waits for

    def expect(self, alone_s: float, row_s: float) -> None:
        """What passes were measured to take: one of one row, and each further row."""
        self._pace = Pace(alone_s, row_s, self.scheduler.max_batch_tokens)
        self.scheduler.prompt_rows = self._pace.rows

    def submit(
        self, session: str, span: Span, step: int, position: int, hidden: Tensor, done: Done, *, answered: bool = False
    ) -> None:
        """Queue a step of an admitted session; `done` is called with its rows, or with why there are none, and with
        the time that it took. `answered` is as for `Scheduler.submit`, which raises what this does.
        """
        self.scheduler.submit(session, step, position, hidden.tokens, answered=answered)
        now = self._clock()
        self.prefixes.make_way(now)
        self._pending[session, step] = _Pending(span, hidden, done, now)
        self._absences.returns(session, now)
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def admit(self, session: str, tokens: int, prefix: Prefix | None = None) -> None:
        """Reserve room for a session; it begins with what `prefix` holds. Raises KvFullError."""
        self.scheduler.admit(session, tokens)
        if prefix is not None:
            try:
                self.runner.fork(prefix.source, session, prefix.tokens)
            except BaseException:
                self.scheduler.release(session)
                raise
            self.scheduler.adopt(session, prefix.tokens)
        self.prefixes.make_way(self._clock())

    def find_prefix(self, owner: str, span: Span, keys: Sequence[bytes], tokens: int) -> Prefix | None:
        """What is there of the pages `keys` of one's prompt, of which `tokens` are to be cached."""
        return self.prefixes.find(owner, span, keys[: tokens // PREFIX_PAGE_TOKENS], self._clock())

    def keep_prefix(self, owner: str, span: Span, keys: Sequence[bytes], session: str, outputs: History) -> None:
        """Keep those pages for others. Only from within `done`: no pass works on the session then."""
        self.prefixes.keep(owner, span, keys, session, outputs, self._clock())

    def abandon(self, session: str) -> None:
        """Drop what a session has queued; a step that a pass is working on is finished."""
        self.scheduler.abandon(session, running=session in self._running)
        left = set(self.scheduler.steps_of(session))
        for key in [key for key in self._pending if key[0] == session and key[1] not in left]:
            del self._pending[key]

    def release(self, session: str) -> None:
        """Forget a session: its queued steps, its reservation and its kv, as soon as no pass uses it."""
        self._drop_steps(session)
        self.scheduler.release(session)
        self._absences.forget(session)
        if session in self._running:
            self._leaving.add(session)
        else:
            self.runner.release(session)

    async def serve(self) -> None:
        """Run until cancelled."""
        while True:
            batch = self.scheduler.schedule()
            if not batch:
                await self._submitted()
                await self._gather()
                continue
            decoding = [piece.decodes for piece in batch]
            begin = self._clock()
            wait_s = self._worth_waiting_s(begin, decoding=any(decoding))
            if wait_s > 0:
                if await self._somebody_returned(wait_s):
                    continue
                batch = self.scheduler.schedule()  # some of those who waited may have left meanwhile
                if not batch:
                    continue
                decoding = [piece.decodes for piece in batch]
                begin = self._clock()
            self._running = {piece.session for piece in batch}
            results = await self.runner.run([self._chunk(piece) for piece in batch])
            end = self._clock()
            self.passes += 1
            tokens = sum([piece.tokens for piece in batch])
            self.rows += tokens
            pass_s = max(end - begin, 0.0)
            if all(decoding):
                self._decode_pass_s = pass_s
            else:
                self._prompt_pass_s = pass_s
            self._watcher.ran(tokens, pass_s)
            if self._pace is not None:
                self._pace.ran(tokens, pass_s)
                self.scheduler.prompt_rows = self._pace.rows
            self.scheduler.finish(batch)
            self._running = set()
            for piece, result in zip(batch, results, strict=True):
                self._settle(piece, result, begin, end)
            while self._leaving:
                self.runner.release(self._leaving.pop())

    async def _gather(self) -> None:
        """Sessions that were in a pass together come back one after the other: let them catch up with the first.

        Without this the first would run alone, the others behind it, and every weight would be read twice from then on.
        """
        while self.scheduler.missing_mates and not self._worth_waiting_s(self._clock(), decoding=True):
            waiting = self.scheduler.waiting_sessions
            await asyncio.sleep(GATHER * self._decode_pass_s)
            if self.scheduler.waiting_sessions == waiting:
                return

    def _worth_waiting_s(self, now: float, *, decoding: bool) -> float:
        """How long a pass had better wait for those who decode and are about to be back.

        One over prompts alone would make their tokens wait for all of it. One in which others decode reads the weights
        once more if it does not wait: who is away for no longer than that takes costs less than a pass of their own.
        """
        if decoding:
            alone_s = self._pace.alone_s if self._pace is not None else 0.0
            return self._absences.wait_s(now, alone_s, away_s=alone_s)
        return self._absences.wait_s(now, WORTH_WAITING * self._prompt_pass_s)

    async def _somebody_returned(self, wait_s: float) -> bool:
        """Within that time."""
        try:
            async with asyncio.timeout(wait_s):
                await self._submitted()
        except TimeoutError:
            return False
        return True

    async def _submitted(self) -> None:
        """Wait for the next step."""
        self._idle = asyncio.get_running_loop().create_future()
        await self._idle

    def _chunk(self, piece: Slice) -> Chunk:
        pending = self._pending[piece.session, piece.step]
        rows = pending.hidden.rows(piece.offset, piece.offset + piece.tokens)
        return Chunk(piece.session, pending.span, piece.position, rows)

    def _settle(self, piece: Slice, result: Tensor | Fault, begin: float, end: float) -> None:
        """Hand a finished step to its session; a fault also ends the steps that were queued behind it."""
        pending = self._pending.get((piece.session, piece.step))
        if pending is None:
            return  # its session left while the pass ran
        pending.computed_s += max(end - begin, 0.0)
        if isinstance(result, Fault):
            self.scheduler.fail(piece.session, piece.position - piece.offset)
            self._drop_steps(piece.session)
            pending.done(result, pending.spent(end))
            return
        pending.parts.append(result)
        if piece.completes:
            del self._pending[piece.session, piece.step]
            if piece.returns:
                self._absences.leaves(piece.session, end)
            queue_us, _ = spent = pending.spent(end)
            self._watcher.waited(queue_us / 1e6)
            pending.done(join_rows(pending.parts), spent)

    def _drop_steps(self, session: str) -> None:
        for key in [key for key in self._pending if key[0] == session]:
            del self._pending[key]
