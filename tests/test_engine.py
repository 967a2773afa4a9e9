"""When a peer begins a pass: at once for one session, a moment later for sessions that come back together."""

import asyncio
import itertools
from collections.abc import Sequence

import pytest

from llmasos.config import PROMPT_STRETCH
from llmasos.peer.engine import GATHER, Engine
from llmasos.peer.runner import Fault, Speed
from llmasos.peer.scheduler import Scheduler
from llmasos.span import Span
from llmasos.wire import Spent, Tensor
from sim.loop import run
from sim.runner import SimRunner, from_numbers

SPAN = Span(0, 3)
PASS_S = 0.004
GATHER_S = GATHER * PASS_S


def passes(arrivals: Sequence[float], *, silent: int = 0, silent_s: float = 0.0) -> tuple[int, list[float]]:
    """Sessions have decoded together; so many of them do so no more, and the others go on by themselves for a while.
    Then steps of one row, each of its own session, arrive at these times: the passes it takes, and when each is done.
    """
    done_at: dict[str, float] = {}

    async def main() -> int:
        loop = asyncio.get_running_loop()
        runner = SimRunner(SPAN, Speed(first_row_s=PASS_S / len(SPAN), row_s=1e-9))
        engine = Engine(runner, Scheduler(10_000, 64), loop.time)
        serving = asyncio.create_task(engine.serve())
        names = [str(index) for index in range(len(arrivals) + silent)]
        steps = itertools.count()

        def submit(name: str) -> None:
            step = next(steps)

            def done(rows: Tensor | Fault, spent: Spent) -> None:
                done_at[name] = loop.time() - zero

            engine.submit(name, SPAN, step, 0, from_numbers([7]), done)

        zero = 0.0
        for name in names:
            engine.scheduler.admit(name, 10)
            submit(name)
        await asyncio.sleep(0.05)
        until = loop.time() + silent_s
        while loop.time() < until:
            for name in names[: len(arrivals)]:
                submit(name)
            await asyncio.sleep(0.01)
        before, zero = engine.passes, loop.time()
        for name, at in zip(names, sorted(arrivals), strict=False):
            await asyncio.sleep(zero + at - loop.time())
            submit(name)
        await asyncio.sleep(1.0)
        serving.cancel()
        return engine.passes - before

    count = run(main())
    return count, [done_at[str(index)] for index in range(len(arrivals))]


def test_a_lone_session_waits_for_nobody() -> None:
    count, (done_s,) = passes([0.0])
    assert count == 1
    assert abs(done_s - PASS_S) < 1e-6


def test_sessions_that_come_one_after_the_other_share_a_pass() -> None:
    count, _ = passes([0.0007 * n for n in range(8)])
    assert count == 1


def test_nobody_waits_long_for_who_does_not_come() -> None:
    count, (done_s,) = passes([0.0], silent=5)
    assert count == 1
    assert done_s <= GATHER_S + PASS_S + 1e-6


def test_nobody_is_waited_for_who_has_been_away_for_long() -> None:
    _, (done_s,) = passes([0.0], silent=5, silent_s=0.5)
    assert abs(done_s - PASS_S) < 1e-6


@pytest.mark.parametrize(("away_s", "shares"), [(0.5 * PASS_S, True), (0.9 * PASS_S, True), (3 * PASS_S, False)])
def test_who_decodes_in_other_passes_is_waited_for_if_that_is_shorter_than_a_pass(away_s: float, shares: bool) -> None:
    """Two sessions, half a pass behind each other: they come to share passes, or none waits to have both."""

    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        runner = SimRunner(SPAN, Speed(first_row_s=PASS_S / len(SPAN), row_s=1e-9))
        engine = Engine(runner, Scheduler(10_000, 64), loop.time)
        engine.expect(PASS_S, 1e-9)
        serving = asyncio.create_task(engine.serve())
        waits: list[float] = []

        async def decode(name: str, begin: float) -> None:
            engine.scheduler.admit(name, 100)
            await asyncio.sleep(begin)
            for step in range(20):
                done = asyncio.Event()
                began = loop.time()
                engine.submit(name, SPAN, step, step, from_numbers([7]), lambda *_: done.set())  # noqa: B023
                await done.wait()
                waits.append(loop.time() - began)
                await asyncio.sleep(away_s)

        await asyncio.gather(decode("a", 0.0), decode("b", 0.5 * PASS_S if shares else 2 * PASS_S))
        serving.cancel()
        return max(waits[10:]), engine.passes

    longest_s, passes = run(main())
    if shares:
        assert passes <= 25, "twenty, and a few until they have met"
        assert longest_s <= PASS_S + away_s + 1e-6
    else:
        assert passes == 40
        assert longest_s <= PASS_S + 1e-6


@pytest.mark.parametrize(("away_s", "waits"), [(0.002, True), (0.1, False)])
def test_a_prompt_lets_those_pass_first_who_are_about_to_return(away_s: float, waits: bool) -> None:
    """Who is away for a moment shall not find a pass over a prompt begun; who is away for long holds up no prompt."""
    row_s = (PROMPT_STRETCH - 1) * PASS_S / 100

    async def main() -> tuple[list[float], float]:
        loop = asyncio.get_running_loop()
        runner = SimRunner(SPAN, Speed(first_row_s=PASS_S / len(SPAN), row_s=row_s / len(SPAN)))
        scheduler = Scheduler(10_000, 256)
        engine = Engine(runner, scheduler, loop.time)
        engine.expect(PASS_S, row_s)
        serving = asyncio.create_task(engine.serve())
        scheduler.admit("text", 100)
        scheduler.admit("prompt", 2000)
        prompt_done = asyncio.Event()
        engine.submit("prompt", SPAN, 0, 0, from_numbers([7] * 2000), lambda *_: prompt_done.set())
        began, took = loop.time(), []
        for step in range(100):
            done = asyncio.Event()
            at = loop.time()
            engine.submit("text", SPAN, step, step, from_numbers([7]), lambda *_: done.set())  # noqa: B023
            await done.wait()
            if prompt_done.is_set():
                break
            took.append(loop.time() - at)
            await asyncio.sleep(away_s)
        serving.cancel()
        return took, loop.time() - began

    took, seconds = run(main())
    alone_s = PASS_S + 100 * row_s
    if waits:
        assert max(took[2:]) <= alone_s + 1e-3, "it waits for no pass but its own"
    assert seconds <= 2000 / 100 * (alone_s + (3 * away_s if waits else 0)) + 2 * away_s + 2 * alone_s


def test_who_comes_later_has_the_next_pass() -> None:
    count, (first_s, second_s) = passes([0.0, GATHER_S + 0.0015])
    assert count == 2
    assert first_s <= GATHER_S + PASS_S + 1e-6
    assert second_s <= 2 * PASS_S + 2 * GATHER_S + 1e-6


def test_who_leaves_while_a_pass_waits_for_others_is_not_in_it() -> None:
    """The peer died of it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        runner = SimRunner(SPAN, Speed(first_row_s=PASS_S / len(SPAN), row_s=1e-9))
        engine = Engine(runner, Scheduler(10_000, 64), loop.time)
        engine.expect(PASS_S, 1e-9)
        serving = asyncio.create_task(engine.serve())

        async def step(name: str, number: int) -> None:
            done = asyncio.Event()
            engine.submit(name, SPAN, number, number, from_numbers([7]), lambda *_: done.set())
            await done.wait()

        for name in ("awaited", "leaver", "stayer"):
            engine.scheduler.admit(name, 100)
        for number in range(8):
            await step("awaited", number)
            await asyncio.sleep(0.5 * PASS_S)
        await step("awaited", 8)  # it is usually back in half a pass
        passes = engine.passes
        engine.submit("leaver", SPAN, 0, 0, from_numbers([7]), lambda *_: pytest.fail("it has left"))
        await asyncio.sleep(0.2 * PASS_S)
        assert engine.passes == passes
        engine.release("leaver")
        await asyncio.sleep(PASS_S)
        assert not serving.done()
        await step("stayer", 0)
        serving.cancel()

    run(main())
