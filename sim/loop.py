"""An asyncio event loop in virtual time: when nothing is left to do, the clock jumps to the next timer.

An hour of sleeps takes no time, and the same program with the same seeds takes the same steps every time: timers
due at the same moment fire in the order in which they were set. There is no I/O and no thread to wait for, so a loop
with nothing to do and no timer set would wait for ever: that is a deadlock, and raises one that lists who waits.
"""

import asyncio
import contextvars
import heapq
import math
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class DeadlockError(RuntimeError):
    """Nothing is ready and no timer is set: no task can ever run again."""


def run(main: Coroutine[Any, Any, T], *, start: float = 0.0) -> T:
    """Run `main` to its end in virtual time that begins at `start` seconds, and clean up like `asyncio.run`."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        return runner.run(main)


class _Timer(asyncio.TimerHandle):
    """A timer handle that orders ties by age; a heap alone would not."""

    __slots__ = ("order",)
    order: int

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, _Timer):
            return NotImplemented
        return (self.when(), self.order) < (other.when(), other.order)


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. Relies on five private names of `BaseEventLoop`, the same in Python 3.11 to 3.13."""

    _scheduled: list[_Timer]
    _selector: "VirtualLoop"

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self._now = start
        self._ages = count()
        self._selector = self  # asked for events before each turn: here time moves instead

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run `callback` when the clock reaches `when`, after every callback set earlier for the same moment."""
        self._check_closed()  # type: ignore[attr-defined]
        timer = _Timer(when, callback, args, self, context)
        timer.order = next(self._ages)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def select(self, timeout: float | None) -> list[Any]:
        """Called by the base class when it has run out of ready callbacks (then `timeout` is not 0)."""
        if timeout is None:
            raise DeadlockError(f"at {self._now:.6f} s nothing is ready and no timer is set\n{self._waiting()}")
        if timeout > 0:
            self._now = self._scheduled[0].when()
            # the base class runs what is due *before* now + resolution; after months of seconds 1 ns adds nothing
            self._clock_resolution = max(1e-9, math.ulp(self._now))
        return []

    def _waiting(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        return "\n".join(f"  {task.get_name()} waits in {_where(task)}" for task in tasks)

    def run_in_executor(self, executor: Any, func: Callable[[Unpack[Ts]], T], *args: *Ts) -> "asyncio.Future[T]":
        """Refused: what a thread does takes real time, and its end could not be replayed."""
        raise RuntimeError("no threads in virtual time: hand the work to the simulated Runner")

    def _process_events(self, event_list: list[Any]) -> None:
        """There are no events but timers."""

    def _write_to_self(self) -> None:
        """Wakes a sleeping selector; ours never sleeps. (Ctrl-C calls this.)"""


def _where(task: asyncio.Task[Any]) -> str:
    """The calls that a suspended task is in, outermost first."""
    calls = []
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        calls.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = awaited.cr_await
    return " > ".join(calls)
