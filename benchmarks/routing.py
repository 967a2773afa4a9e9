"""How long planning takes as the swarm grows. Run: python -m benchmarks.routing

One model of 128 blocks. Between two plans a hundredth of the records are announced anew, as within 70 ms of a real
swarm: the view takes them in one by one, so what a plan costs includes nothing cached that would be stale in life.
Three swarms: peers that are all alike on aligned ranges (a data centre), mixed machines on aligned ranges, and mixed
machines on ranges that begin and end anywhere (the hardest: hardly two alike). Times are medians, in milliseconds of
this process' CPU time: a plan never waits, so what others do on the machine is left out as far as it can be. `worst`
is the slowest single plan. The limit is 20 ms for 10,000 records.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

from llmasos.routing.health import Health
from llmasos.routing.placement import choose_span
from llmasos.routing.planner import plan, replan
from llmasos.routing.records import PeerRecord, PeerState
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import SwarmView
from llmasos.span import Span

BLOCKS = 128
SIZES = (100, 300, 1_000, 3_000, 10_000)
PLANS = 41
LIMIT_MS = 20.0
NOW = 1_000.0
REQUEST = RouteRequest(
    model="big", digest="sha256:0", model_blocks=BLOCKS, prompt_tokens=200, new_tokens=64, kv_tokens=300
)


def aligned(rng: Random) -> Span:
    length = rng.choice([4, 8, 16, 32, 64])
    start = rng.randrange(BLOCKS // length) * length
    return Span(start, start + length)


def anywhere(rng: Random) -> Span:
    start = rng.randrange(BLOCKS)
    return Span(start, rng.randint(start + 1, min(BLOCKS, start + 64)))


def a_peer(number: int, span: Span, rng: Random, *, alike: bool) -> PeerRecord:
    block_seconds = 0.001 if alike else rng.lognormvariate(-7.0, 1.0)
    return PeerRecord(
        peer=f"peer{number}",
        model="big",
        digest="sha256:0",
        model_blocks=BLOCKS,
        span=span,
        state=PeerState.ONLINE,
        incarnation=1,
        announced_at=NOW - rng.uniform(0, 7),
        dtype="bfloat16",
        version="0.1.0",
        block_seconds=block_seconds,
        row_seconds=block_seconds * (0.1 if alike else rng.uniform(0.02, 0.9)),
        throughput=100.0,
        active_sessions=0 if alike else rng.choice([0, 0, 1, 2, 4, 16]),
        queued_tokens=0 if alike else rng.choice([0, 0, 0, 60, 900]),
        kv_free_tokens=rng.randrange(20_000),
        kv_total_tokens=20_000,
    )


SWARMS: dict[str, tuple[Callable[[Random], Span], bool]] = {
    "alike, aligned": (aligned, True),
    "mixed, aligned": (aligned, False),
    "mixed, anywhere": (anywhere, False),
}


def a_swarm(kind: str, peers: int, rng: Random) -> tuple[SwarmView, list[PeerRecord]]:
    choose, alike = SWARMS[kind]
    records = [a_peer(0, Span(0, BLOCKS), rng, alike=alike)]  # so that small swarms cover the model too
    records += [a_peer(number, choose(rng), rng, alike=alike) for number in range(1, peers)]
    records[0] = replace(records[0], kv_free_tokens=20_000)
    view = SwarmView()
    for record in records:
        view.add(record)
    return view, records


def milliseconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return (time.process_time() - begin) * 1e3


def measure(kind: str, peers: int) -> float:
    rng = Random(f"{kind} {peers}")
    view, records = a_swarm(kind, peers, rng)
    health = Health()
    for record in rng.sample(records, 50):
        health.saw_step(record.peer, 8, 0.01, NOW)
        health.opened(record.peer, 300, NOW)
    plan_ms, add_ms, replan_ms = [], [], []
    hops = 0
    for number in range(PLANS):
        for record in rng.sample(records, max(1, peers // 100)):
            renewed = replace(record, announced_at=NOW + number / 100)
            add_ms.append(milliseconds(partial(view.add, renewed)))
        plan_ms.append(milliseconds(lambda: plan(view, REQUEST, NOW, rng, health)))
        route = plan(view, REQUEST, NOW, rng, health)
        hops = max(hops, len(route.hops))
        dead = next((peer for peer in route.peers if peer != "peer0"), None)
        if dead is not None:
            replan_ms.append(milliseconds(partial(replan, view, REQUEST, route, dead, NOW, rng, health)))
    replanned = f"{statistics.median(replan_ms):8.2f}" if replan_ms else "       -"
    print(
        f"{kind:16} {peers:7,} {statistics.median(plan_ms):8.2f} {max(plan_ms):8.2f} {replanned}"
        f" {statistics.median(add_ms):8.3f} {hops:5}"
    )
    return statistics.median(plan_ms)


def main() -> int:
    print(f"{'swarm':16} {'peers':>7} {'plan':>8} {'worst':>8} {'replan':>8} {'add':>8} {'hops':>5}")
    slowest_ms = max([measure(kind, peers) for kind in SWARMS for peers in SIZES])
    rng = Random(5)
    view, _ = a_swarm("mixed, anywhere", SIZES[-1], rng)
    print(f"expire {milliseconds(lambda: view.expire(NOW)):.2f} ms, ", end="")
    placed_ms = milliseconds(lambda: choose_span(view, "big", BLOCKS, 32, 100.0, NOW, rng))
    print(f"choose_span {placed_ms:.1f} ms, at {SIZES[-1]:,} peers")
    print(f"limit of {LIMIT_MS:g} ms {'kept' if slowest_ms < LIMIT_MS else 'BROKEN'}: {slowest_ms:.2f} ms")
    return 0 if slowest_ms < LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
