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
from itertools import chain, islice
from random import Random
from typing import NamedTuple

from llmasos.errors import MissingBlocksError
from llmasos.routing.cost import NO_COST, HopCost, Work, hop_cost
from llmasos.routing.health import Health
from llmasos.routing.missing import missing_blocks, refusal
from llmasos.routing.records import PeerRecord
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import Checkpoint, Pool, SwarmView
from llmasos.span import Span

__all__ = ["Hop", "Route", "RouteRequest", "plan", "replan"]

SPREAD = 0.25
"""Routes within a quarter of the cheapest count as equal: announced loads are up to ANNOUNCE_EVERY_S old, and measured
speeds repeat within 10 - 20 % on a shared machine."""
SAMPLE = 255
"""Offers looked at to tell what is typical: its median is then within 6 % of the true rank, two times in three."""


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


def plan(view: SwarmView, request: RouteRequest, now: float, rng: Random, health: Health | None = None) -> Route:
    """The cheapest route, or one of those about as cheap. `health` is what this client has seen of peers itself.

    Raises MissingBlocksError, which says for each gap what stands in the way of the peers that have it.
    """
    health = Health() if health is None else health
    checkpoint = _checkpoint(view, request)
    end = checkpoint.blocks if request.end is None else request.end
    allowed = [pool for kind, pool in view.pools(request.model, checkpoint).items() if request.allows(*kind)]
    found = [
        route
        for pools in ([allowed] if request.mixed else [[pool] for pool in allowed])
        if (route := _cheapest(_bids(pools, request, checkpoint, end, now, rng, health), request.start, end))
    ]
    if not found:
        raise missing_blocks(view, request, checkpoint, end, now, health)
    _, legs = min(found, key=lambda route: route[0])
    return Route(tuple(_hop(leg, request.work, now, health) for leg in legs))


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


# --- what each peer asks for it --------------------------------------------------------------------------------------


class _Bid(NamedTuple):
    """A peer's price for this request: `fixed_s + blocks * rate_s`, made dearer by the factor `spread`."""

    fixed_s: float
    rate_s: float
    end: int
    spread: float
    record: PeerRecord


def _bids(
    pools: Sequence[Pool],
    request: RouteRequest,
    checkpoint: Checkpoint,
    end: int,
    now: float,
    rng: Random,
    health: Health,
) -> dict[int, list[_Bid]]:
    """The prices worth having, by the block at which their spans start: whoever is beaten at once is left out."""
    work, link_s, draw = request.work, request.work.link_s(health.typical_rtt_s), rng.random
    typical_fixed_s, typical_rate_s = _typical(pools, work, link_s)
    steps, prompt, chunks, room_needed = work.new_tokens, work.prompt_tokens, work.chunks, request.kv_tokens
    first, pinned = request.start, bool(request.pin)
    singular = request.exclude.union(health)  # peers to look at one by one; with pins that is everybody
    found: dict[int, list[_Bid]] = {}
    for start, group in chain.from_iterable(pool.starts.items() for pool in pools):
        if start >= end:
            continue
        bids = found.setdefault(start, [])
        for peer, (stop, room, expires_at, block_s, row_s, step_s, queue_s, residual_s, record) in group.items():
            if room < room_needed or expires_at <= now or stop <= first:
                continue
            proven = False
            if pinned or peer in singular:
                if refusal(record, expires_at, request, checkpoint, now, health):
                    continue
                seen = health.observed(peer, now, since=record.announced_at)
                fixed_s = hop_cost(record, 0, work, seen).total_s
                rate_s = hop_cost(record, 1, work, seen).total_s - fixed_s
                proven = seen.proven
            else:
                fixed_s = link_s + queue_s + steps * residual_s
                rate_s = steps * step_s + chunks * block_s + prompt * row_s
            # one draw tosses the coin of belief and gives the spread
            luck = 2.0 * draw()
            if luck >= 1.0:
                luck -= 1.0
                if not proven:
                    if fixed_s < typical_fixed_s:
                        fixed_s = typical_fixed_s
                    if rate_s < typical_rate_s:
                        rate_s = typical_rate_s
            spread = 1.0 + SPREAD * luck
            fixed_s *= spread
            rate_s *= spread
            for other in bids:  # a handful
                if other[0] <= fixed_s and other[1] <= rate_s and other[2] >= stop:
                    break
            else:
                bids.append(_Bid(fixed_s, rate_s, stop, spread, record))
    return found


def _typical(pools: Sequence[Pool], work: Work, link_s: float) -> tuple[float, float]:
    """The price in the middle of what is claimed, fixed and per block; of two the higher."""
    stride = max(1, sum(map(len, pools)) // SAMPLE)
    sample = list(islice(chain.from_iterable(pool.offers() for pool in pools), 0, None, stride))
    if not sample:
        return 0.0, 0.0
    fixed_s = sorted(link_s + offer.queue_s + work.new_tokens * offer.residual_s for offer in sample)
    rate_s = sorted(
        work.new_tokens * offer.step_s + work.chunks * offer.block_s + work.prompt_tokens * offer.row_s
        for offer in sample
    )
    return fixed_s[len(sample) // 2], rate_s[len(sample) // 2]


# --- the shortest path -----------------------------------------------------------------------------------------------


class _Leg(NamedTuple):
    bid: _Bid
    span: Span


@dataclass(slots=True)
class _Ride:
    """A peer that a route may be passing through."""

    bid: _Bid
    entered_at: int = -1
    ahead_s: float = float("inf")
    """Cost of the cheapest way in, less what the blocks before it would have cost here: leaving at block `b` costs
    `ahead_s + b * rate_s`, wherever it was entered."""


def _cheapest(bids: dict[int, list[_Bid]], start: int, end: int) -> tuple[float, list[_Leg]] | None:
    """The cheapest chain over `[start, end)` and its cost; None when some block has no bid."""
    cost_s = 0.0  # of reaching the boundary `at`
    arrivals: list[tuple[_Bid, int]] = []  # how the boundary start + 1, start + 2, … is best reached
    rides: list[_Ride] = []
    joining: Iterable[_Bid] = chain.from_iterable(group for first, group in bids.items() if first <= start)
    for at in range(start, end):
        rides = [ride for ride in rides if ride.bid.end > at]
        rides += [_Ride(bid) for bid in _undominated(joining, [ride.bid for ride in rides])]
        best_s, arrival = float("inf"), None
        for ride in rides:
            rate_s = ride.bid.rate_s
            entering_s = cost_s + ride.bid.fixed_s - at * rate_s
            if entering_s < ride.ahead_s:
                ride.ahead_s, ride.entered_at = entering_s, at
            leaving_s = ride.ahead_s + (at + 1) * rate_s
            if leaving_s < best_s:
                best_s, arrival = leaving_s, (ride.bid, ride.entered_at)
        if arrival is None:
            return None
        arrivals.append(arrival)
        cost_s = best_s
        joining = bids.get(at + 1, ())
    return cost_s, list(_walk_back(arrivals, start, end))[::-1]


def _undominated(joining: Iterable[_Bid], present: Sequence[_Bid]) -> list[_Bid]:
    """Of the bids that join, those not beaten in price and reach by one that is there."""
    kept: list[_Bid] = []
    front = [(bid.fixed_s, bid.rate_s, bid.end) for bid in present]
    for bid in joining:
        fixed_s, rate_s, end = bid[:3]
        for other_fixed_s, other_rate_s, other_end in front:
            if other_fixed_s <= fixed_s and other_rate_s <= rate_s and other_end >= end:
                break
        else:
            front.append((fixed_s, rate_s, end))
            kept.append(bid)
    return kept


def _walk_back(arrivals: Sequence[tuple[_Bid, int]], start: int, end: int) -> Iterator[_Leg]:
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
        raise MissingBlocksError(request.model, ["auto"], why="no peer announces this model")
    return Checkpoint(request.digest, other.blocks)
