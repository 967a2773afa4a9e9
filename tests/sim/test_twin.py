"""A small swarm on real libp2p daemons, and its simulated twin: what clients see of both is the same within a quarter.

The blocks of both take their time without computing, so a busy machine disturbs little; `benchmarks/twin.py` compares
blocks that compute, calibrated on the spot.
"""

import time
from dataclasses import replace

import pytest
import uvloop

from llmasos.peer.runner import Speed
from llmasos.span import Span
from llmasos.wire import Tensor
from sim.runner import from_numbers
from sim.stream import Link
from sim.swarm import SimModel
from sim.twin import Measured, TwinWork, drive, paced_swarm, simulated

MODEL = SimModel("twin", blocks=9)
SPANS = [Span(0, 2), Span(2, 5), Span(5, 9)]
SPEED = Speed(first_row_s=0.006, row_s=0.0004)
LINK = Link(latency_s=0.02, bytes_per_s=125e6, jitter=0.2)
WORK = TwinWork(clients=5, requests=3, prompt_tokens=90, new_tokens=12)
TOLERANCE = 0.25
ATTEMPTS = 3
"""A machine that is busy elsewhere for a moment slows the daemons; it makes nothing faster."""


def rows(count: int) -> Tensor:
    return from_numbers(range(1, count + 1))


async def real() -> Measured:
    async with paced_swarm(MODEL, SPANS, SPEED, LINK) as sessions:
        return await drive(WORK, lambda: sessions(WORK), rows, time.monotonic)


@pytest.mark.swarm
def test_a_swarm_and_its_twin_give_their_clients_the_same() -> None:
    twin = simulated(WORK, rows, model=MODEL, spans=SPANS, speed=SPEED, link=LINK)
    seen = []
    for _ in range(ATTEMPTS):
        seen.append(uvloop.run(real()).over(twin))
        if all(abs(ratio - 1) <= TOLERANCE for ratio in seen[-1].values()):
            return
    pytest.fail(f"real over simulated, in {ATTEMPTS} attempts: {seen}")


def test_the_twin_tells_swarms_apart() -> None:
    usual = simulated(WORK, rows, model=MODEL, spans=SPANS, speed=SPEED, link=LINK)
    slower = Speed(2 * SPEED.first_row_s, 2 * SPEED.row_s)
    farther = replace(LINK, latency_s=3 * LINK.latency_s)
    for other in (
        simulated(WORK, rows, model=MODEL, spans=SPANS, speed=slower, link=LINK),
        simulated(WORK, rows, model=MODEL, spans=SPANS, speed=SPEED, link=farther),
    ):
        ratios = other.over(usual)
        assert ratios["tokens/s"] < 1 - TOLERANCE
        assert ratios["next tokens, p50"] > 1 + TOLERANCE
    again = simulated(WORK, rows, model=MODEL, spans=SPANS, speed=SPEED, link=LINK)
    assert again == usual
