"""When a peer begins a pass: at once for one session, a moment later for sessions that come back together."""

import asyncio
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


def passes(arrivals: Sequence[float], *, silent: int = 0) -> tuple[int, list[float]]:
    """Steps of one row, each of its own session, arrive at these times: the passes it took, and when each was done."""
    done_at: dict[str, float] = {}

    async def main() -> int:
        loop = asyncio.get_running_loop()
        runner = SimRunner(SPAN, Speed(first_row_s=PASS_S / len(SPAN), row_s=1e-9))
        engine = Engine(runner, Scheduler(1000, 64), loop.time)
        serving = asyncio.create_task(engine.serve())
        names = [str(index) for index in range(len(arrivals) + silent)]
        for name in names:
            engine.scheduler.admit(name, 10)
        for name, at in zip(names, sorted(arrivals), strict=False):
            await asyncio.sleep(at - loop.time())

            def done(rows: Tensor | Fault, spent: Spent, name: str = name) -> None:
                done_at[name] = loop.time()

            engine.submit(name, SPAN, 0, 0, from_numbers([7]), done)
        await asyncio.sleep(1.0)
        serving.cancel()
        return engine.passes

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


def test_who_comes_later_has_the_next_pass() -> None:
    count, (first_s, second_s) = passes([0.0, 0.0025])
    assert count == 2
    assert first_s <= GATHER_S + PASS_S + 1e-6
    assert second_s <= 2 * PASS_S + 2 * GATHER_S + 1e-6
