"""What must hold at every event of every simulation, whatever is broken meanwhile.

  * each token is the one that a single machine would have given;
  * every request ends, once, with all its tokens or with a typed error that may be tried again; and it does not fail
    for good unless some block really had no peer meanwhile (a scenario may allow a share that finds no room);
  * the kv account of every peer adds up: never negative, never over budget, empty when all sessions are over;
  * queues are bounded, and nobody opens streams in a storm;
  * nothing of ours fails in a way that it did not expect: whatever is logged as an error counts;
  * blocks that lose their last peer are served again within the time that the scenario promises.

The first violation ends the run. It carries the moment, and the command that replays it.
"""

import asyncio
import logging
from collections import deque
from typing import Any

from llmasos.config import MAX_FRAME_BYTES, MAX_PENDING_TOKENS, MAX_STEP_TOKENS
from llmasos.errors import LLMasOSError
from llmasos.peer.peer import Peer
from sim.network import SimNetwork
from sim.stream import WINDOW_BYTES

STORM_WINDOW_S = 10.0
STORM_CONNECTS = 12
"""Streams that a session may open per hop within STORM_WINDOW_S: a hop that is lost every second costs ten."""


class ViolationError(LLMasOSError):
    """An invariant did not hold. The hint is the command that replays the run."""


class Invariants:
    """The judge of one run. `broken` gets the first violation as its exception."""

    def __init__(self, replay: str, *, thorough: bool = True) -> None:
        """`thorough` checks the whole account of a peer after each pass; else only its sums."""
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.checks = 0
        self._loop = asyncio.get_running_loop()
        self._begin = self._loop.time()
        self._replay = replay
        self._thorough = thorough
        self._connects: deque[tuple[float, dict[str, int]]] = deque()
        self._gap_since: dict[int, float] = {}
        self.longest_gap_s = 0.0
        self.last_gap_at = float("-inf")

    def violate(self, problem: str) -> None:
        """Something must not have happened."""
        if not self.broken.done():
            moment = self._loop.time() - self._begin
            self.broken.set_exception(ViolationError(f"at {moment:.3f} s: {problem}", hint=f"replay: {self._replay}"))

    def require(self, holds: bool, problem: str) -> None:
        """The same, unless it holds."""
        self.checks += 1
        if not holds:
            self.violate(problem)

    # --- one request ---

    def answered(self, who: str, position: int, got: int, expected: int) -> None:
        """A token came back."""
        self.checks += 1
        if got != expected:
            self.violate(f"{who}: the token at position {position} is {got}, a single machine gives {expected}")

    # --- one peer ---

    def after_pass(self, peer: Peer) -> None:
        """A peer has run a pass."""
        self.checks += 1
        scheduler = peer.engine.scheduler
        free_tokens = scheduler.kv_free_tokens
        if not 0 <= free_tokens <= scheduler.kv_tokens:
            self.violate(f"{_name(peer)}: {free_tokens} of {scheduler.kv_tokens} kv tokens are free")
        if self._thorough:
            self.check_peer(peer)

    def check_peer(self, peer: Peer) -> None:
        """The whole account, and the queues."""
        self.checks += 1
        scheduler = peer.engine.scheduler
        try:
            scheduler.check()
        except AssertionError as error:
            self.violate(f"{_name(peer)}: {error}")
        bound = (MAX_PENDING_TOKENS + 2 * MAX_STEP_TOKENS) * max(scheduler.active_sessions, 1)
        if scheduler.queued_tokens > bound:
            self.violate(f"{_name(peer)}: {scheduler.queued_tokens} rows wait for {scheduler.active_sessions} sessions")
        assert isinstance(peer.network, SimNetwork)
        for stream in peer.network.streams:
            if stream.held_bytes > WINDOW_BYTES + MAX_FRAME_BYTES:
                self.violate(f"{_name(peer)}: a stream holds {stream.held_bytes} bytes")

    def is_idle(self, peer: Peer) -> None:
        """All sessions are over: nothing may be left of them."""
        scheduler = peer.engine.scheduler
        left = scheduler.kv_tokens - scheduler.kv_free_tokens
        if left or peer.handler.sessions:
            self.violate(f"{_name(peer)}: {peer.handler.sessions} sessions and {left} kv tokens are left of no client")

    # --- the swarm ---

    def count_connects(self, gateways: dict[str, tuple[int, int]]) -> None:
        """Called each second: gateway -> (streams opened so far, hops of the sessions that it has or began lately)."""
        now = self._loop.time()
        self._connects.append((now, {name: opened for name, (opened, _) in gateways.items()}))
        while self._connects[0][0] < now - STORM_WINDOW_S:
            self._connects.popleft()
        before = self._connects[0][1]
        for name, (opened, hops) in gateways.items():
            lately = opened - before.get(name, 0)
            self.require(
                lately <= STORM_CONNECTS * (hops + 1),
                f"{name} opened {lately} streams in {STORM_WINDOW_S:.0f} s, for {hops} hops: a retry storm",
            )

    def coverage(self, counts: list[int], promised_s: float | None) -> None:
        """Called each second with how many peers serve each block."""
        now = self._loop.time()
        for block, count in enumerate(counts):
            if count:
                self._gap_since.pop(block, None)
                continue
            lasted_s = now - self._gap_since.setdefault(block, now)
            self.longest_gap_s = max(self.longest_gap_s, lasted_s)
            self.last_gap_at = now
            if promised_s is not None and lasted_s > promised_s:
                self.violate(f"block {block} has had no peer for {lasted_s:.0f} s; {promised_s:g} s are promised")

    def task_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception that nobody saw (an asyncio exception handler)."""
        error = context.get("exception")
        self.violate(f"{context.get('message')}: {type(error).__name__}: {error}")


class ErrorWatch(logging.Handler):
    """What the shipped code logs as an error is one: the run ends."""

    def __init__(self, invariants: Invariants) -> None:
        super().__init__(logging.ERROR)
        self._invariants = invariants

    def emit(self, record: logging.LogRecord) -> None:
        self._invariants.violate(f"{record.name} logs: {record.getMessage()}")


def _name(peer: Peer) -> str:
    assert isinstance(peer.network, SimNetwork)
    return peer.network.name
