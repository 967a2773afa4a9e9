"""Deadlines for what hardly ever misses one: `asyncio.timeout` sets and cancels a timer for each wait, which is dearer
than most of the waits that a frame takes.
"""

import asyncio
import types
from collections.abc import Coroutine, Generator
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Raises TimeoutError if it waits for longer; what ends without waiting sets no timer."""
    try:
        waits_for = work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    async with asyncio.timeout(seconds):
        return await _rest(work, waits_for)


@types.coroutine
def _rest(work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """A coroutine that has begun, from what it waits for to its end."""
    while True:
        try:
            yield waits_for
        except BaseException as error:  # noqa: BLE001 - it is told, whatever it is
            go_on = partial(work.throw, error)
        else:
            go_on = partial(work.send, None)
        try:
            waits_for = go_on()
        except StopIteration as end:
            result: T = end.value
            return result


class Silence:
    """How long one listens without hearing anything: between `begins` and `ends`, again and again, TimeoutError is
    raised in the block after `seconds`. However often that is, there is one timer, which looks again when it fires.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._until: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._limit.__aexit__(kind, error, trace)

    def begins(self) -> None:
        """From now on nothing is heard."""
        self._until = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(self._until, self._look)

    def ends(self) -> None:
        """Something was."""
        self._until = None

    def _look(self) -> None:
        self._timer = None
        if self._until is None:
            return
        if self._until <= self._loop.time():
            self._limit.reschedule(self._until)
        else:
            self._timer = self._loop.call_at(self._until, self._look)
