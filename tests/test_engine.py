"""When a peer begins a pass: at once for one session, a moment later for sessions that come back together."""

import asyncio
import itertools
from collections.abc import Sequence

from llmasos.peer.engine import GATHER_S, Engine
from llmasos.peer.runner import Fault, Speed
from llmasos.peer.scheduler import Scheduler
from llmasos.span import Span
from llmasos.wire import Spent, Tensor
from sim.loop import run
from sim.runner import SimRunner, from_numbers

SPAN = Span(0, 3)
PASS_S = 0.004


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


def test_who_comes_later_has_the_next_pass() -> None:
    count, (first_s, second_s) = passes([0.0, 0.0025])
    assert count == 2
    assert first_s <= GATHER_S + PASS_S + 1e-6
    assert second_s <= 2 * PASS_S + 2 * GATHER_S + 1e-6
