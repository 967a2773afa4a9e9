"""Who may start now, who waits, and who is told to come back: pure bookkeeping on the event loop.

A request takes as many places as it has choices. When all are taken it waits, one queue a key; keys take turns, so
that one with a hundred requests does not hold up another with one. What waits is bounded; beyond it a refusal says so,
and goes to the newest request of the key that has most of them waiting.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from llmasos.client.gateway_keys import Key
from llmasos.client.openai_fields import ApiError

MINUTE_S = 60.0


@dataclass(slots=True)
class _Account:
    """What one key has used lately."""

    running: int = 0
    requests: deque[float] = field(default_factory=deque)  # when each of the last minute began
    tokens: deque[tuple[float, int]] = field(default_factory=deque)  # when, and how many

    def forget(self, now: float) -> None:
        """Drop what is more than a minute ago."""
        while self.requests and self.requests[0] <= now - MINUTE_S:
            self.requests.popleft()
        while self.tokens and self.tokens[0][0] <= now - MINUTE_S:
            self.tokens.popleft()


@dataclass(slots=True, eq=False)
class _Waiting:
    places: int
    turn: asyncio.Future[None]


class Admission:
    """Places for `max_running` choices at once; queues for `max_waiting` requests, each for `max_wait_s` at most.

    `refused` is told the reason of each refusal.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        max_wait_s: float,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.running = 0
        self.waiting = 0
        self._max_running, self._max_waiting, self._max_wait_s = max_running, max_waiting, max_wait_s
        self._refused = refused
        self._accounts: dict[str, _Account] = {}
        self._queues: OrderedDict[str, deque[_Waiting]] = OrderedDict()  # the first key has the next turn

    @asynccontextmanager
    async def enter(self, key: Key, places: int) -> AsyncIterator[None]:
        """Hold `places`. Raises ApiError, 429 for what is the key's own limit and 503 for what is everybody's."""
        account = self._accounts.setdefault(key.name, _Account())
        self._check(key, account)
        account.requests.append(asyncio.get_running_loop().time())
        account.running += 1
        try:
            await self._take(key.name, places)
            try:
                yield
            finally:
                self.running -= places
                self._let_in()
        finally:
            account.running -= 1

    def spent(self, key: Key, tokens: int) -> None:
        """Tokens that a request has used; they count for a minute."""
        account = self._accounts.setdefault(key.name, _Account())
        account.tokens.append((asyncio.get_running_loop().time(), tokens))

    def _check(self, key: Key, account: _Account) -> None:
        now = asyncio.get_running_loop().time()
        account.forget(now)
        if key.requests_per_minute is not None and len(account.requests) >= key.requests_per_minute:
            wait_s = account.requests[0] + MINUTE_S - now
            raise self._limit("requests", f"{key.requests_per_minute} requests a minute", wait_s)
        if key.tokens_per_minute is not None and sum(count for _, count in account.tokens) >= key.tokens_per_minute:
            raise self._limit(
                "tokens", f"{key.tokens_per_minute} tokens a minute", account.tokens[0][0] + MINUTE_S - now
            )
        if key.concurrent is not None and account.running >= key.concurrent:
            raise self._limit("concurrent", f"{key.concurrent} requests at once", 1.0)

    def _limit(self, reason: str, what: str, wait_s: float) -> ApiError:
        self._refused(reason)
        return ApiError(
            f"this key may have {what}",
            status=429,
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after_s=wait_s,
        )

    async def _take(self, name: str, places: int) -> None:
        if not self.waiting and self._fits(places):
            self.running += places
            return
        if self.waiting >= self._max_waiting:
            self._make_room(name)
        waiting = _Waiting(places, asyncio.get_running_loop().create_future())
        self._queues.setdefault(name, deque()).append(waiting)
        self.waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s):
                await waiting.turn
        except BaseException as error:
            if waiting.turn.done() and not waiting.turn.cancelled() and waiting.turn.exception() is None:
                self.running -= places  # our turn came in the very moment in which we gave up
                self._let_in()
            else:
                self._leave(name, waiting)
                self._let_in()  # it may have stood before one that fits
            if isinstance(error, TimeoutError):
                raise self._full(f"no place became free in {self._max_wait_s:g} s") from None
            raise

    def _make_room(self, name: str) -> None:
        """Turn somebody away, so that `name` can wait. Raises ApiError if that is `name` itself."""
        full = self._full(f"{self.running} texts are being written and {self.waiting} requests wait")
        most = max(self._queues, key=lambda key: len(self._queues[key]), default=name)
        if len(self._queues.get(most, ())) <= len(self._queues.get(name, ())) + 1:
            raise full
        newest = self._queues[most][-1]
        self._leave(most, newest)
        if not newest.turn.done():
            newest.turn.set_exception(full)

    def _full(self, why: str) -> ApiError:
        self._refused("full")
        return ApiError(
            f"the gateway is full: {why}",
            status=503,
            kind="service_unavailable",
            code="overloaded",
            retry_after_s=min(self._max_wait_s, 5.0),
        )

    def _fits(self, places: int) -> bool:
        return self.running == 0 or self.running + places <= self._max_running

    def _let_in(self) -> None:
        """Give free places to those whose turn it is."""
        while self._queues:
            name, queue = next(iter(self._queues.items()))
            waiting = queue[0]
            if waiting.turn.done():  # cancelled just now; it has not come to leaving by itself
                self._leave(name, waiting)
                continue
            if not self._fits(waiting.places):
                return
            self._leave(name, waiting)
            if queue:
                self._queues.move_to_end(name)
            self.running += waiting.places
            waiting.turn.set_result(None)

    def _leave(self, name: str, waiting: _Waiting) -> None:
        queue = self._queues.get(name)
        if queue is None or waiting not in queue:
            return
        queue.remove(waiting)
        self.waiting -= 1
        if not queue:
            del self._queues[name]
