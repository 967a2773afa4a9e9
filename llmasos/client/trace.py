"""Where the time of a text went: what each hop spent on each step, and what is left for the network between them.

A hop tells how long a step waited there and was computed; what the whole step took is measured here. No clock is
compared with another machine's: what no hop accounts for is the network's. How that divides over the links of a route
is reckoned from the round trips of pings; for a route of one hop there is nothing to divide.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llmasos.client.flights import Flight
from llmasos.routing.planner import Hop
from llmasos.wire import Result

RoundTrip = Callable[[str], float]
"""Seconds to a peer and back, as far as they are known."""


@dataclass(frozen=True, slots=True)
class HopTime:
    """Milliseconds on one hop. `network_ms` is the way to it, and behind the last hop the way back as well."""

    peer: str
    blocks: str
    queue_ms: float
    compute_ms: float
    network_ms: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step, on its way through the route: rows for `tokens` positions from `position` on.

    `begin_ms` counts from the beginning of the text. `total_ms` is the sum of what its hops have.
    """

    begin_ms: float
    total_ms: float
    position: int
    tokens: int
    hops: tuple[HopTime, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """The steps of one text, and what each hop had of them together. `total_ms` is the sum of the steps'.

    Chunks of a prompt are under way at the same time, so that the sum may be more than the time that went by.
    """

    total_ms: float
    hops: tuple[HopTime, ...]
    steps: tuple[StepTime, ...]


@dataclass(frozen=True, slots=True)
class _Taken:
    """A step as it was taken down. `trail` is what the hops say, each (queue, compute) in microseconds."""

    begin: float
    end: float
    position: int
    tokens: int
    route: tuple[Hop, ...]
    trail: tuple[tuple[int, int], ...]


class Tracer:
    """Takes down the steps of a session, by the clock that its flights go by."""

    def __init__(self, round_trip: RoundTrip, clock: Callable[[], float]) -> None:
        self._round_trip = round_trip
        self._clock = clock
        self._began = clock()
        self._taken: list[_Taken] = []

    def begin(self) -> None:
        """A text begins: what was before is forgotten."""
        self._began = self._clock()
        self._taken.clear()

    def took(self, flight: Flight, result: Result, route: tuple[Hop, ...]) -> None:
        """A step has been answered, just now."""
        taken = _Taken(flight.sent_at, self._clock(), flight.position, flight.tokens, route, result.spent or ())
        self._taken.append(taken)

    def last(self) -> StepTime | None:
        """The latest step."""
        return self._step(self._taken[-1]) if self._taken else None

    def trace(self) -> Trace:
        """What has been taken down of the text so far."""
        steps = tuple(self._step(taken) for taken in self._taken)
        return Trace(sum(step.total_ms for step in steps), _sums(steps), steps)

    def _step(self, taken: _Taken) -> StepTime:
        total_ms = 1e3 * max(taken.end - taken.begin, 0.0)
        trail = taken.trail
        if len(trail) != len(taken.route):  # peers of an older version tell nothing
            trail = ((0, 0),) * len(taken.route)
        told_ms = sum(queue + compute for queue, compute in trail) / 1e3
        belief = min(total_ms / told_ms, 1.0) if told_ms else 1.0  # nobody spends more than there was
        network_ms = total_ms - belief * told_ms
        hops = tuple(
            HopTime(hop.peer, str(hop.span), belief * queue / 1e3, belief * compute / 1e3, share * network_ms)
            for hop, (queue, compute), share in zip(taken.route, trail, self._shares(taken.route), strict=True)
        )
        return StepTime(1e3 * (taken.begin - self._began), total_ms, taken.position, taken.tokens, hops)

    def _shares(self, route: Sequence[Hop]) -> list[float]:
        """What part of a step's time on the network goes to each hop. A link between peers, which nobody here has
        seen, counts as the mean of ours to both.
        """
        rtts_s = [self._round_trip(hop.peer) for hop in route]
        links = [rtts_s[0] / 2, *((one + other) / 4 for one, other in pairwise(rtts_s))]
        links[-1] += rtts_s[-1] / 2
        whole = sum(links)
        return [link / whole if whole else 1 / len(links) for link in links]


def _sums(steps: Sequence[StepTime]) -> tuple[HopTime, ...]:
    """By peer and blocks, in the order in which they first served."""
    found: dict[tuple[str, str], HopTime] = {}
    for step in steps:
        for hop in step.hops:
            known = found.get((hop.peer, hop.blocks), HopTime(hop.peer, hop.blocks, 0.0, 0.0, 0.0))
            found[hop.peer, hop.blocks] = HopTime(
                hop.peer,
                hop.blocks,
                known.queue_ms + hop.queue_ms,
                known.compute_ms + hop.compute_ms,
                known.network_ms + hop.network_ms,
            )
    return tuple(found.values())


def trace_from_json(found: Mapping[str, Any]) -> Trace:
    """A trace that has been through JSON."""
    steps = (StepTime(**{**step, "hops": _hops(step["hops"])}) for step in found["steps"])
    return Trace(found["total_ms"], _hops(found["hops"]), tuple(steps))


def _hops(found: Sequence[Mapping[str, Any]]) -> tuple[HopTime, ...]:
    return tuple(HopTime(**hop) for hop in found)


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """The trace in the format that chrome://tracing and Perfetto read.

    Each hop is a process of its own there. A step's slices stand one behind the other, in the order of the route: their
    lengths are measured, where one ends and the next begins is reckoned.
    """
    events: list[dict[str, Any]] = [_name(0, "steps, as the client sees them")]
    numbers = {(hop.peer, hop.blocks): number for number, hop in enumerate(trace.hops, start=1)}
    events += [_name(number, f"{blocks} on {peer[-8:]}") for (peer, blocks), number in numbers.items()]
    for index, step in enumerate(trace.steps):
        what = f"{step.tokens} rows from {step.position}"
        events += _slice(0, index, what, step.begin_ms, step.total_ms)
        at_ms = step.begin_ms
        for hop in step.hops:
            for part, length_ms in (("network", hop.network_ms), ("queue", hop.queue_ms), ("compute", hop.compute_ms)):
                events += _slice(numbers[hop.peer, hop.blocks], index, part, at_ms, length_ms)
                at_ms += length_ms
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _name(process: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}


def _slice(process: int, step: int, name: str, begin_ms: float, length_ms: float) -> list[dict[str, Any]]:
    """Asynchronous events, since steps overlap; the format counts in microseconds."""
    common = {"cat": "step", "name": name, "id": step, "pid": process, "tid": 0}
    return [
        {**common, "ph": "b", "ts": round(1e3 * begin_ms, 1)},
        {**common, "ph": "e", "ts": round(1e3 * (begin_ms + length_ms), 1)},
    ]
