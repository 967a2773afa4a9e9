"""Deadlines keep what `asyncio.timeout` promises. In virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from llmasos.deadlines import Silence, within
from sim.loop import run

T = TypeVar("T")


def timed(main: Callable[[], Awaitable[T]]) -> tuple[T, float]:
    """What it returns, and after how long."""

    async def play() -> tuple[T, float]:
        return await main(), asyncio.get_running_loop().time()

    return run(play())


async def sleep_and_say(seconds: float, said: list[str], *, tidy_s: float = 0.0) -> str:
    """Sleeps in two parts; `said` tells how it ended, after some tidying up."""
    try:
        await asyncio.sleep(seconds / 2)
        await asyncio.sleep(seconds / 2)
    except asyncio.CancelledError:
        await asyncio.sleep(tidy_s)
        said.append("cancelled")
        raise
    said.append("done")
    return "slept"


# --- within ----------------------------------------------------------------------------------------------------------


def test_what_ends_without_waiting_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once() -> int:
        return 7

    def no_timer(_: float) -> None:
        raise AssertionError("a timer was set")

    async def main() -> int:
        monkeypatch.setattr(asyncio, "timeout", no_timer)
        return await within(1, at_once())

    assert timed(main) == (7, 0)


def test_what_ends_in_time_returns() -> None:
    said: list[str] = []
    assert timed(lambda: within(5, sleep_and_say(4, said))) == ("slept", 4)
    assert said == ["done"]


@pytest.mark.parametrize("seconds", [6, 11])
def test_what_takes_too_long_is_cancelled_in_either_wait_and_may_tidy_up(seconds: float) -> None:
    said: list[str] = []

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await within(5, sleep_and_say(seconds, said, tidy_s=2))

    assert timed(main) == (None, 7)
    assert said == ["cancelled"]


@pytest.mark.parametrize("wait_s", [None, 1.0])
def test_what_fails_fails_as_it_does(wait_s: float | None) -> None:
    async def fail() -> None:
        if wait_s is not None:
            await asyncio.sleep(wait_s)
        raise KeyError("mine")

    async def main() -> None:
        with pytest.raises(KeyError, match="mine"):
            await within(5, fail())

    run(main())


def test_a_cancelled_task_is_cancelled_and_not_late() -> None:
    said: list[str] = []

    async def main() -> None:
        task = asyncio.create_task(within(5, sleep_and_say(4, said)))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert timed(main) == (None, 1)
    assert said == ["cancelled"]


def test_a_timeout_within_is_its_own() -> None:
    async def inner() -> str:
        try:
            async with asyncio.timeout(1):
                await asyncio.sleep(3)
        except TimeoutError:
            await asyncio.sleep(2)
            return "went on"
        return "was not stopped"

    assert timed(lambda: within(5, inner())) == ("went on", 3)


# --- silence ---------------------------------------------------------------------------------------------------------


def test_silence_counts_from_its_beginning_and_not_while_something_is_heard() -> None:
    heard = []

    async def listen() -> None:
        async with Silence(5) as silence:
            for pause_s, work_s in [(4, 30), (4, 0), (1, 0), (4.5, 3), (60, 0)]:
                silence.begins()
                await asyncio.sleep(pause_s)
                silence.ends()
                await asyncio.sleep(work_s)
                heard.append(pause_s)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await listen()

    assert timed(main)[1] == 34 + 4 + 1 + 7.5 + 5
    assert heard == [4, 4, 1, 4.5]


def test_silence_that_is_over_leaves_no_timer_and_stops_nobody() -> None:
    async def main() -> str:
        async with Silence(5) as silence:
            silence.begins()
            await asyncio.sleep(1)
        await asyncio.sleep(10)
        return "undisturbed"

    assert timed(main) == ("undisturbed", 11)


def test_silence_has_one_timer_however_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        set_for = []
        honest = loop.call_at
        monkeypatch.setattr(loop, "call_at", lambda when, *rest, **more: (set_for.append(when), honest(when, *rest))[1])
        async with Silence(15) as silence:
            for _ in range(1_000):
                silence.begins()
                await asyncio.sleep(0)
                silence.ends()
        return len(set_for)

    assert timed(main)[0] == 1
