"""Continuous batching as pure bookkeeping: which rows of which sessions go into the next forward pass.

No tensors, no clock, no I/O. The engine's life is one sentence - *schedule, run, finish* - and this file is its first
and last word:

    submit(session, step, …)      a step waits
    schedule() -> Batch           the next pass: every decoding session, then prompt chunks into the room that is left
    finish(batch)                 its rows are cached; steps whose last row was in it are done

Laws, checked by `check()` and by the property test:
  * `0 <= cached <= reserved` for each session, and the sum of `reserved` is never over the kv budget;
  * steps of one session run in the order they came; rows of a step run in order;
  * a decoding step waits for at most one pass, whatever prompts are queued (it is always scheduled before them);
  * while somebody decodes, that pass has at most `prompt_rows` rows of prompts, and some if any wait;
  * between sessions the order is round-robin: no session is passed over twice while it has work.
"""

from collections import deque
from dataclasses import dataclass, field

import msgspec

DECODE_ROWS = 16
"""A step of at most this many rows counts as decoding (one token, or a speculated handful): it goes before prompts."""

PROMPT_SHARE = 16
"""A prompt that waits has this part of each pass, however many decode: without it they could hold it up for ever."""
RECENT_PASSES = 16
"""Who got an answer in one of so many passes is on the way back with the next token: a pass must not be long then."""


class KvFullError(Exception):
    """The reservation does not fit. `free_tokens` is what would."""

    def __init__(self, wanted_tokens: int, free_tokens: int) -> None:
        super().__init__(f"no room for {wanted_tokens} more tokens in the kv cache; {free_tokens} are free")
        self.free_tokens = free_tokens


class GapError(Exception):
    """A step begins behind the end of what its session will have cached by then."""


class _Work(msgspec.Struct):
    """One step that waits; `done` of its rows have run."""

    step: int
    position: int
    tokens: int
    answered: bool
    done: int = 0

    @property
    def left(self) -> int:
        return self.tokens - self.done

    @property
    def decodes(self) -> bool:
        """See `Slice`."""
        return self.tokens <= DECODE_ROWS


@dataclass(slots=True)
class _Session:
    reserved: int
    cached: int = 0
    answered_in: int = -RECENT_PASSES  # number of the last pass that it got an answer in
    queue: deque[_Work] = field(default_factory=deque)

    @property
    def end(self) -> int:
        """The position behind everything cached or queued."""
        return self.queue[-1].position + self.queue[-1].tokens if self.queue else self.cached


class Slice(msgspec.Struct, frozen=True):
    """Rows `[offset, offset + tokens)` of one step, for the positions from `position` on.

    The step `decodes` if it is a token, or a few guesses; the end of a prompt does not. Its session `returns` with a
    token when it decodes, or when the client is answered at once.
    """

    session: str
    step: int
    position: int
    offset: int
    tokens: int
    completes: bool
    decodes: bool
    returns: bool


Batch = tuple[Slice, ...]


class Scheduler:
    """The queue and the kv account of one peer. `kv_tokens` is the budget, `max_batch_tokens` the rows of one pass."""

    def __init__(self, kv_tokens: int, max_batch_tokens: int) -> None:
        self.kv_tokens = kv_tokens
        self.max_batch_tokens = max_batch_tokens
        self.prompt_rows = max_batch_tokens
        """Most rows of prompts in a pass while somebody decodes: who sets it bounds how long a token takes."""
        self._passes = 0
        self._sessions: dict[str, _Session] = {}  # in round-robin order: who was served last stands last
        self._reserved = 0

    @property
    def active_sessions(self) -> int:
        return len(self._sessions)

    @property
    def waiting_sessions(self) -> int:
        """How many sessions have a step that has not run."""
        return sum(1 for session in self._sessions.values() if session.queue)

    @property
    def returning_sessions(self) -> int:
        """How many sessions got an answer a moment ago and are expected back with their next token."""
        return sum(
            1
            for session in self._sessions.values()
            if not session.queue and self._passes - session.answered_in < RECENT_PASSES
        )

    @property
    def missing_mates(self) -> int:
        """How many sessions got an answer in the same pass as one that waits now, and have not come back."""
        if len(self._sessions) < 2:
            return 0
        sessions = self._sessions.values()
        passes = {session.answered_in for session in sessions if session.queue and session.answered_in >= 0}
        return sum(1 for session in sessions if not session.queue and session.answered_in in passes)

    @property
    def kv_free_tokens(self) -> int:
        return self.kv_tokens - self._reserved

    @property
    def queued_tokens(self) -> int:
        return sum(work.left for session in self._sessions.values() for work in session.queue)

    def queued_tokens_of(self, session: str) -> int:
        """Rows of one session that have not run; 0 for a session that is gone."""
        entry = self._sessions.get(session)
        return sum([work.left for work in entry.queue]) if entry is not None and entry.queue else 0

    def admit(self, session: str, tokens: int) -> None:
        """Reserve room for `tokens` cached tokens. Raises KvFullError."""
        if session in self._sessions:
            raise ValueError(f"session {session} is open already")
        self._reserve(tokens)
        self._sessions[session] = _Session(reserved=tokens)

    def adopt(self, session: str, tokens: int) -> None:
        """The first `tokens` positions of an admitted session, within its reservation, are cached already."""
        self._sessions[session].cached = tokens

    def submit(self, session: str, step: int, position: int, tokens: int, *, answered: bool = False) -> None:
        """Queue a step. A position below the end rolls the session back to it when the step runs. `answered`: there is
        no other hop, and the client gets what comes of it at once. It is back with a token then, a prompt too.

        Raises GapError when the step would leave a hole, KvFullError when the session outgrows its reservation and
        the budget has no more; in both cases nothing has changed.
        """
        entry = self._sessions[session]
        if position > entry.end:
            raise GapError(f"step {step} begins at position {position}, but the session ends at {entry.end}")
        outgrown = position + tokens - entry.reserved
        if outgrown > 0:
            self._reserve(outgrown)
            entry.reserved += outgrown
        entry.queue.append(_Work(step, position, tokens, answered))

    def schedule(self) -> Batch:
        """The next pass, empty when nothing waits. One slice a session; call `finish` before scheduling again."""
        short: list[tuple[str, _Work]] = []
        long: list[tuple[str, _Work]] = []
        for name, entry in self._sessions.items():
            if entry.queue:
                work = entry.queue[0]
                (short if work.left <= DECODE_ROWS else long).append((name, work))
        chosen: list[Slice] = []
        kept = -(-self.max_batch_tokens // PROMPT_SHARE) if long else 0
        room = _fill(chosen, short, self.max_batch_tokens - kept) + kept
        if long:
            somebody_decodes = short or self.returning_sessions  # a token waits, or is about to come
            _fill(chosen, long, min(room, self.prompt_rows) if somebody_decodes else room)
        return tuple(chosen)

    def finish(self, batch: Batch) -> None:
        """Account for a pass that has run. Steps whose session was released meanwhile are passed over."""
        for piece in batch:
            entry = self._sessions.get(piece.session)
            if entry is None or not entry.queue or entry.queue[0].step != piece.step:
                continue
            self._sessions[piece.session] = self._sessions.pop(piece.session)  # served: to the back of the round
            work = entry.queue[0]
            if piece.returns:
                entry.answered_in = self._passes
            work.done += piece.tokens
            entry.cached = piece.position + piece.tokens
            if piece.completes:
                entry.queue.popleft()
        self._passes += 1

    def steps_of(self, session: str) -> list[int]:
        """The steps of a session that wait or run, in order."""
        entry = self._sessions.get(session)
        return [work.step for work in entry.queue] if entry else []

    def abandon(self, session: str, *, running: bool = False) -> None:
        """Drop what a session has queued, since nobody waits for it. What steps have cached that are done stays; what a
        part of one has does not count, as nobody has seen it. `running`: the first is in a pass, and stays.
        """
        entry = self._sessions.get(session)
        while entry and len(entry.queue) > running:
            work = entry.queue.pop()
            if work.done:
                entry.cached = min(entry.cached, work.position)

    def fail(self, session: str, position: int) -> None:
        """A step that begins at `position` failed: nothing of it is cached. Those behind it would build on it, and are
        dropped.
        """
        self.abandon(session)
        entry = self._sessions.get(session)
        if entry:
            entry.cached = min(entry.cached, position)

    def release(self, session: str) -> None:
        """The session is over; its room is free at once. Unknown sessions are ignored."""
        entry = self._sessions.pop(session, None)
        if entry:
            self._reserved -= entry.reserved

    def check(self) -> None:
        """Raise AssertionError, with the numbers, when the account does not add up."""
        total = sum(entry.reserved for entry in self._sessions.values())
        assert total == self._reserved, f"sessions reserve {total} tokens, the account says {self._reserved}"
        assert 0 <= self._reserved <= self.kv_tokens, f"{self._reserved} reserved of {self.kv_tokens}"
        for name, entry in self._sessions.items():
            assert 0 <= entry.cached <= entry.reserved, f"session {name}: {entry.cached} cached, {entry.reserved} kept"
            assert all(0 <= work.done < max(work.tokens, 1) for work in entry.queue), f"session {name}: a step overran"

    def _reserve(self, tokens: int) -> None:
        if tokens > self.kv_free_tokens:
            raise KvFullError(tokens, self.kv_free_tokens)
        self._reserved += tokens


def _fill(chosen: list[Slice], heads: list[tuple[str, _Work]], room: int) -> int:
    """Choose as many rows of these steps as there is room for; returns the room that is left."""
    for name, work in heads:
        done, decodes = work.done, work.decodes
        left = work.tokens - done
        rows = min(left, room)
        if rows or not left:
            completes = rows == left
            returns = completes and (decodes or work.answered)
            chosen.append(Slice(name, work.step, work.position + done, done, rows, completes, decodes, returns))
            room -= rows
    return room
