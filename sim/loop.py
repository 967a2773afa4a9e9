"""An asyncio event loop in virtual time: when nothing is left to do, the clock jumps to the next timer.

An hour of sleeps takes no time, and the same program with the same seeds takes the same steps every time: timers
due at the same moment fire in the order in which they were set. There is no I/O and no thread to wait for, so a loop
with nothing to do and no timer set would wait for ever: that is a deadlock, and raises one that lists who waits.
"""

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import partial
from itertools import count, repeat
from typing import Any, TypeVar, TypeVarTuple, Unpack

import msgspec

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


MANY_TIMERS = 100
"""Cancelled timers beyond which the heap is swept: almost every frame sets a deadline and cancels it again."""


class DeadlockError(RuntimeError):
    """Nothing is ready and no timer is set: no task can ever run again."""


def run(main: Coroutine[Any, Any, T], *, start: float = 0.0) -> T:
    """Run `main` to its end in virtual time that begins at `start` seconds, and clean up like `asyncio.run`."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        return runner.run(main)


def _nothing() -> None:
    """What is left of a callback that was cancelled."""


class _Handle(msgspec.Struct):
    """A callback that is due, with what of `asyncio.Handle` anybody asks for. Millions are made: nothing is faster."""

    context: contextvars.Context
    callback: Callable[..., object]
    args: tuple[Any, ...]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True
        self.callback, self.args = _nothing, ()  # it holds on to nobody

    def cancelled(self) -> bool:
        return self.is_cancelled


class _Timer(_Handle, kw_only=True):
    """The same for one that is set for later: while it is, `loop` counts those that are cancelled."""

    loop: "VirtualLoop | None"

    def cancel(self) -> None:
        if self.loop is not None and not self.is_cancelled:
            self.loop.cancelled_timers += 1
            self.callback, self.args = _nothing, ()
        self.is_cancelled = True


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. Replaces the turn of `BaseEventLoop` and its heap of timers, which Python 3.11 to 3.13 share.

    Timers stand in the heap as (when, age, handle): compared in C, and those of one moment by age.
    """

    _ready: "deque[_Handle]"
    _stopping: bool

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self._now = start
        self._ages = count()
        self._timers: list[tuple[float, int, _Timer]] = []
        self.create_future = partial(asyncio.Future, loop=self)  # type: ignore[method-assign]
        # Never: each future asks, and what it would note then is what `waiting` says.
        self.get_debug = repeat(False).__next__  # type: ignore[method-assign]
        self.cancelled_timers = 0
        """How many of those that are set have been cancelled since."""
        self.turns = 0

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
        timer = _Timer(copy_context() if context is None else context, callback, args, loop=self)
        heapq.heappush(self._timers, (when, next(self._ages), timer))
        return timer  # type: ignore[return-value]

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """The same, `delay` seconds from now."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Run `callback` in the next turn. No debug mode and no other threads here, and so nothing to ask first."""
        handle = _Handle(copy_context() if context is None else context, callback, args)
        self._ready.append(handle)
        return handle  # type: ignore[return-value]

    def close(self) -> None:
        """Drop what is still set."""
        super().close()
        self._timers.clear()

    def waiting(self) -> str:
        """Every task that is not done and the calls that it is in, one a line."""
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        return "\n".join(f"  {task.get_name()} waits in {where(task)}" for task in tasks)

    def _run_once(self) -> None:
        """Turns until the loop is stopped. A turn moves time if nothing is ready, then runs what is ready now, not what
        that makes ready.
        """
        ready, timers = self._ready, self._timers
        while True:
            self.turns += 1
            if self.cancelled_timers > MANY_TIMERS and self.cancelled_timers > len(timers) // 2:
                timers[:] = [entry for entry in timers if not entry[2].is_cancelled]
                heapq.heapify(timers)
                self.cancelled_timers = 0
            now = self._now
            if not ready and not self._stopping:  # on to the next timer that has not been cancelled
                while timers and timers[0][2].is_cancelled:
                    heapq.heappop(timers)
                    self.cancelled_timers -= 1
                if not timers:
                    raise DeadlockError(f"at {now:.6f} s nothing is ready and no timer is set\n{self.waiting()}")
                self._now = now = max(now, timers[0][0])
            while timers and timers[0][0] <= now:
                timer = heapq.heappop(timers)[2]
                timer.loop = None
                if timer.is_cancelled:
                    self.cancelled_timers -= 1
                else:
                    ready.append(timer)
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle.is_cancelled:
                    continue
                try:
                    handle.context.run(handle.callback, *handle.args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001 - as asyncio does: the loop goes on
                    problem = f"Exception in callback {handle.callback!r}"
                    self.call_exception_handler({"message": problem, "exception": error, "handle": handle})
            if self._stopping:
                return

    def run_in_executor(self, executor: Any, func: Callable[[Unpack[Ts]], T], *args: *Ts) -> "asyncio.Future[T]":
        """Refused: what a thread does takes real time, and its end could not be replayed."""
        raise RuntimeError("no threads in virtual time: hand the work to the simulated Runner")

    def _write_to_self(self) -> None:
        """Wakes a sleeping selector; ours never sleeps. (Ctrl-C calls this.)"""


def where(task: asyncio.Task[Any]) -> str:
    """The calls that a suspended task is in, outermost first."""
    calls = []
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        calls.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = awaited.cr_await
    return " > ".join(calls)
