"""plan(view, request, now, rng) -> Route: the cheapest chain of spans that covers the blocks asked for.

A route may enter and leave a peer's span at any block. A hop over `L` blocks of a peer costs `fixed + L · rate` seconds
(`cost.py`), so this is a shortest path over block boundaries. It is found in one sweep from the first block to the
last: at each boundary it is known what reaching it costs, and which *rides* pass through it - peers that a route
may have entered, or may enter here. A peer is dropped for good when it joins beside another that reaches as far and is
no dearer in either price; that leaves a few rides a boundary, however many peers there are.

**No herd.** All clients read about the same view. So each plan makes every offer dearer by a random factor of up to
`1 + SPREAD` and then takes the cheapest route: equal peers are equally likely, a peer that is clearly better always
wins, and no route is dearer than the cheapest by more than SPREAD. Sessions that this client has just opened itself
count as load at once (`health.py`), although no record shows them yet.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

from llmasos.errors import MissingBlocksError
from llmasos.routing.cost import NO_COST, HopCost, Work, hop_cost
from llmasos.routing.health import Health
from llmasos.routing.market import SPREAD, Bid, Market, Ride
from llmasos.routing.missing import missing_blocks
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import Checkpoint, SwarmView
from llmasos.span import Span

__all__ = ["Hop", "Route", "RouteRequest", "draw", "plan", "replan"]


@dataclass(frozen=True, slots=True)
class Hop:
    """The blocks `span` of a route, computed by `peer`."""

    peer: str
    span: Span
    addresses: tuple[str, ...] = ()
    cost: HopCost = NO_COST
    dtype: str = ""
    quantization: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """Hops whose spans join without a gap or an overlap. A peer may appear twice, when that is cheaper."""

    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        if not self.hops:
            raise ValueError("a route has at least one hop")
        for before, after in zip(self.hops, self.hops[1:], strict=False):
            if before.span.end != after.span.start:
                raise ValueError(f"the hops {before.span} and {after.span} do not join")

    @property
    def span(self) -> Span:
        """The blocks that it covers."""
        return Span(self.hops[0].span.start, self.hops[-1].span.end)

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(hop.peer for hop in self.hops)

    @property
    def total_s(self) -> float:
        """What the request is expected to take."""
        return sum(hop.cost.total_s for hop in self.hops)


def plan(
    view: SwarmView,
    request: RouteRequest,
    now: float,
    rng: Random,
    health: Health | None = None,
    *,
    spread: float = SPREAD,
    hopeful: bool = False,
) -> Route:
    """The cheapest route, or one that is dearer by no more than the share `spread`.

    `health` is what this client has seen of peers itself; to be `hopeful` is to take peers that it has never measured
    to be as near as the nearest, and not as far as the typical one, and those that were far long ago to be nearer.
    Raises MissingBlocksError, which says for each gap what stands in the way of the peers that have it.
    """
    return next(draw(view, request, now, rng, health, [(hopeful, spread)]))


def draw(
    view: SwarmView,
    request: RouteRequest,
    now: float,
    rng: Random,
    health: Health | None,
    draws: Iterable[tuple[bool, float]],
) -> Iterator[Route]:
    """A `plan` for each (hopeful, spread), made when it is asked for; what does not depend on chance is computed once,
    from what is known when the first is.
    """
    health = Health() if health is None else health
    checkpoint = _checkpoint(view, request)
    end = checkpoint.blocks if request.end is None else request.end
    pools = {kind: pool for kind, pool in view.pools(request.model, checkpoint).items() if request.allows(*kind)}
    kinds = [sorted(pools)] if request.mixed else [[kind] for kind in sorted(pools)]
    markets = [
        Market(view, {kind: pools[kind] for kind in together}, request, checkpoint, end, now, rng, health)
        for together in kinds
    ]
    for hopeful, spread in draws:
        found: list[tuple[float, list[_Leg]]] = []
        for market in markets:
            market.open(hopeful=hopeful, spread=spread)
            cheapest = _cheapest(market, request.start, end)
            if cheapest is not None:
                found.append(cheapest)
        if not found:
            raise missing_blocks(view, request, checkpoint, end, now, health)
        _, legs = min(found, key=lambda route: route[0])
        yield Route(tuple(_hop(leg, request.work, now, health) for leg in legs))


def replan(
    view: SwarmView,
    request: RouteRequest,
    route: Route,
    dead: str,
    now: float,
    rng: Random,
    health: Health | None = None,
) -> Route:
    """`route` with the blocks of the peer `dead` given to others of the same numerics; all other hops stay as they are.

    Raises MissingBlocksError when nobody else can take them.
    """
    hops: list[Hop] = []
    for hop in route.hops:
        if hop.peer != dead:
            hops.append(hop)
            continue
        gap = replace(
            request,
            start=hop.span.start,
            end=hop.span.end,
            exclude=request.exclude | {dead},
            dtype=request.dtype if request.mixed else hop.dtype,
            quantization=request.quantization if request.mixed else hop.quantization,
        )
        hops.extend(plan(view, gap, now, rng, health).hops)
    return Route(tuple(hops))


# --- the shortest path -----------------------------------------------------------------------------------------------


class _Leg(NamedTuple):
    bid: Bid
    span: Span


def _cheapest(market: Market, start: int, end: int) -> tuple[float, list[_Leg]] | None:
    """The cheapest chain over `[start, end)` and its cost; None when some block has no bid."""
    cost_s = 0.0  # of reaching the boundary `at`
    arrivals: list[tuple[Bid, int]] = []  # how the boundary start + 1, start + 2, … is best reached
    rides: list[Ride] = []
    for at in range(start, end):
        market.join(at, rides)
        best_s, best = float("inf"), None
        for ride in rides:
            rate_s = ride.rate_s
            entering_s = cost_s + ride.fixed_s - at * rate_s
            if entering_s < ride.ahead_s:
                ride.ahead_s, ride.entered_at = entering_s, at
            leaving_s = ride.ahead_s + (at + 1) * rate_s
            if leaving_s < best_s:
                best_s, best = leaving_s, ride
        if best is None:
            return None
        arrivals.append((best.bid, best.entered_at))
        cost_s = best_s
        # Leaving any other ride now is dearer than leaving the best. Those that neither go farther nor are cheaper from
        # here on, nor when entered anew, are of no more use.
        reach, rate_s, one_s = best.end, best.rate_s, best.fixed_s + best.rate_s
        rides = [
            ride
            for ride in rides
            if ride.end > at + 1
            and (ride.end > reach or ride.rate_s < rate_s or ride.fixed_s + ride.rate_s < one_s or ride is best)
        ]
    return cost_s, list(_walk_back(arrivals, start, end))[::-1]


def _walk_back(arrivals: Sequence[tuple[Bid, int]], start: int, end: int) -> Iterator[_Leg]:
    while end > start:
        bid, entered_at = arrivals[end - start - 1]
        yield _Leg(bid, Span(entered_at, end))
        end = entered_at


def _hop(leg: _Leg, work: Work, now: float, health: Health) -> Hop:
    record = leg.bid.record
    cost = hop_cost(record, len(leg.span), work, health.observed(record.peer, now, since=record.announced_at))
    asked_s = (leg.bid.fixed_s + len(leg.span) * leg.bid.rate_s) / leg.bid.spread
    doubt_s = max(0.0, asked_s - cost.total_s)
    return Hop(
        record.peer,
        leg.span,
        record.addresses,
        replace(cost, doubt_s=doubt_s),
        dtype=record.dtype,
        quantization=record.quantization,
    )


def _checkpoint(view: SwarmView, request: RouteRequest) -> Checkpoint:
    """The weights asked for. How many blocks they have is best known to the client, else the swarm is asked."""
    if request.model_blocks is not None:
        return Checkpoint(request.digest, request.model_blocks)
    known = view.checkpoint(request.model, request.digest)
    if known is not None:
        return known
    if request.end is not None:
        return Checkpoint(request.digest, request.end)
    other = view.checkpoint(request.model)
    if other is None:
        raise MissingBlocksError(request.model, ["auto"])
    return Checkpoint(request.digest, other.blocks)
