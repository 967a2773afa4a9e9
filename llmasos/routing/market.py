"""What each peer asks for a request, heard in the order in which a route meets the peers.

Most offers can never be part of the cheapest route: another one that reaches as far is cheaper both for a single block
and for all of them - and since a price is a straight line over blocks, for everything between. Those are not heard.
Offers with the same first block come the fastest first, so that most of the others fail at a glance, against the best
rival of their reach. That is what makes a plan over ten thousand records cheap.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from random import Random
from typing import NamedTuple

from llmasos.routing.cost import hop_price
from llmasos.routing.health import Health
from llmasos.routing.missing import refusal
from llmasos.routing.records import PeerRecord
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import Checkpoint, Numerics, Pool, Ranked, SwarmView

SPREAD = 0.25
"""Routes within a quarter of the cheapest count as equal: announced loads are up to ANNOUNCE_EVERY_S old, and measured
speeds repeat within 10 - 20 % on a shared machine."""

_INFINITE = float("inf")
_REACH = itemgetter(2)


class Bid(NamedTuple):
    """A peer's price for this request: `fixed_s + blocks * rate_s`, made dearer by the factor `spread`."""

    fixed_s: float
    rate_s: float
    end: int
    spread: float
    record: PeerRecord


class Ride:
    """A peer that a route may be passing through."""

    __slots__ = ("ahead_s", "bid", "end", "entered_at", "fixed_s", "rate_s")

    def __init__(self, bid: Bid) -> None:
        self.bid = bid
        self.fixed_s, self.rate_s, self.end = bid[:3]  # at hand, for the sweep
        self.entered_at = -1
        # The cost of the cheapest way in, less what the blocks before it would have cost here: leaving at block `b`
        # costs `ahead_s + b * rate_s`, wherever it was entered.
        self.ahead_s = _INFINITE


class Rivals:
    """The bids that a newcomer has to face at one block, and for each reach the best of those that go so far.

    One bid beats another that goes no farther if it is no dearer for one block and for all that the other has: prices
    are straight lines, so it is no dearer for anything between.
    """

    def __init__(self, bids: list[Bid], at: int, last: int) -> None:
        self._at = at
        self._bids = bids
        self.rate_s = [_INFINITE] * (last + 1)
        """By reach: what the best asks for each block, …"""
        self.one_s = [_INFINITE] * (last + 1)
        """… and for the first one, fixed price included."""
        nearest_last = sorted(bids, key=_REACH)
        best_rate_s = best_one_s = _INFINITE
        for reach in range(last, at, -1):
            while nearest_last and nearest_last[-1].end >= reach:
                fixed_s, rate_s, _, _, _ = nearest_last.pop()
                more = reach - at - 1
                if fixed_s + rate_s + more * rate_s < best_one_s + more * best_rate_s:
                    best_rate_s, best_one_s = rate_s, fixed_s + rate_s
            self.rate_s[reach], self.one_s[reach] = best_rate_s, best_one_s

    def add(self, bid: Bid) -> None:
        self._bids.append(bid)
        rate_s, one_s = bid.rate_s, bid.fixed_s + bid.rate_s
        for more, reach in enumerate(range(self._at + 1, bid.end + 1)):
            if one_s + more * rate_s < self.one_s[reach] + more * self.rate_s[reach]:
                self.rate_s[reach], self.one_s[reach] = rate_s, one_s

    def beat(self, bid: Bid) -> bool:
        """Whether one of them beats this one."""
        one_s, length = bid.fixed_s + bid.rate_s, bid.end - self._at
        all_s = bid.fixed_s + length * bid.rate_s
        for fixed_s, rate_s, end, _, _ in self._bids:
            if end >= bid.end and fixed_s + rate_s <= one_s and fixed_s + length * rate_s <= all_s:
                return True
        return False


def _unbeaten(bids: list[Bid], at: int, last: int) -> list[Bid]:
    """Those of some bids that none of the others beats at block `at`."""
    best: list[Bid] = []
    rivals = Rivals(best, at, last)
    for bid in sorted(bids, key=lambda bid: bid.fixed_s + bid.rate_s):
        if not rivals.beat(bid):
            best.append(bid)
    return best


Quote = tuple[float, float, float, float, bool, int, int, PeerRecord]
"""What a peer of which we know more than its record says asks for this request: `fixed_s`, `rate_s`, its link, what of
that may be saved if it is nearer by now, whether it is proven, its first block and the last, its record."""


class Market:
    """All offers for one request. `open` begins a plan; `join` is then to be called for each block in turn."""

    def __init__(
        self,
        view: SwarmView,
        pools: Mapping[Numerics, Pool],
        request: RouteRequest,
        checkpoint: Checkpoint,
        end: int,
        now: float,
        rng: Random,
        health: Health,
    ) -> None:
        work = request.work
        self._pools = list(pools.values())
        self._request = request
        self._end = end
        self._now = now
        self._draw = rng.random
        self._work = work
        self._health = health
        self._spread = self._link_s = 0.0
        self._risk_s = risk_s = work.risk_s(health.losses_per_step)  # of any hop
        most = max(self._pools, key=len, default=Pool())
        self._typical_wait_s, self._typical_rate_s = most.typical(work)
        # Peers of which we know more than their records say are asked one by one; with pins there are no others.
        self._known = request.exclude.union(health)
        self._known_bids: dict[int, list[Bid]] = {}
        self._quotes: list[Quote] = []
        leases = view.leases(request.model)
        for peer in dict.fromkeys(request.pin or health):
            if peer not in leases:
                continue
            record, expires_at = leases[peer]
            seen = health.observed(peer, now, since=record.announced_at)
            if refusal(record, expires_at, request, checkpoint, now, health, seen) is not None:
                continue
            if (record.dtype, record.quantization) not in pools:
                continue
            fixed_s, rate_s, link_s = hop_price(record, work, seen)
            hoped_s = work.trips_s(seen.rtt_s - seen.hoped_rtt_s)
            start, last = record.span.start, min(record.span.end, end)
            self._quotes.append((fixed_s, rate_s, link_s + risk_s, hoped_s, seen.proven, start, last, record))

    def open(self, *, hopeful: bool, spread: float) -> None:
        """Toss the coins of a new plan; whom nobody has measured is `hopeful`ly near, or as far as is typical."""
        self._spread = spread
        rtt_s = self._health.nearest_rtt_s if hopeful else self._health.typical_rtt_s
        self._link_s = self._work.link_s(rtt_s) + self._risk_s
        bids: dict[int, list[Bid]] = {}
        self._known_bids = bids
        draw, typical_wait_s, typical_rate_s = self._draw, self._typical_wait_s, self._typical_rate_s
        for fixed_s, rate_s, link_s, hoped_s, proven, start, end, record in self._quotes:
            if hopeful:
                fixed_s -= hoped_s
                link_s -= hoped_s
            # One draw tosses the coin of belief, and says how much dearer it gets.
            luck = 2.0 * draw()
            if luck >= 1.0:
                luck -= 1.0
                if not proven:  # how far it is is no claim
                    fixed_s = max(fixed_s, link_s + typical_wait_s)
                    rate_s = max(rate_s, typical_rate_s)
            dearer = 1.0 + spread * luck
            bid = Bid(fixed_s * dearer, rate_s * dearer, end, dearer, record)
            if start in bids:
                bids[start].append(bid)
            else:
                bids[start] = [bid]

    def join(self, at: int, rides: list[Ride]) -> None:
        """Add to `rides` the bids worth hearing that begin at block `at`; at the first block, those before it too."""
        starts = range(at + 1) if at == self._request.start else (at,)
        known = [bid for start in starts for bid in self._known_bids.get(start, ()) if bid.end > at]
        if known:
            rides += map(Ride, _unbeaten(known, at, self._end))
        if self._request.pin:
            return
        groups = [pool.starts[start] for pool in self._pools for start in starts if start in pool.starts]
        if groups:
            rides += [Ride(bid) for bid in self._hear(groups, at, [ride.bid for ride in rides])]

    def _hear(self, groups: Sequence[list[Ranked]], at: int, present: list[Bid]) -> list[Bid]:
        """The bids of some groups that those `present` do not beat, nor any heard before them, from block `at` on.

        This is where the time of a plan goes, so it is all in one place and looks at each offer as briefly as it can.
        """
        link_s, now, known, draw, last = self._link_s, self._now, self._known, self._draw, self._end
        most = self._spread
        typical_wait_s, typical_rate_s = self._typical_wait_s, self._typical_rate_s
        steps, prompt, chunks = (float(n) for n in (self._work.new_tokens, self._work.prompt_tokens, self._work.chunks))
        room_needed = self._request.kv_tokens
        heard: list[Bid] = []
        rivals = Rivals(present, at, last)
        best_rate_s, best_one_s = rivals.rate_s, rivals.one_s  # by reach
        for group in groups:
            for step_s, peer, end, row_s, offer in group:
                # 1. Pass over who could not keep up with the best of the same reach even if nobody waited there.
                if end > last:
                    end = last
                rate_s = steps * step_s + prompt * row_s
                if end <= at or (rate_s >= best_rate_s[end] and link_s + rate_s >= best_one_s[end]):
                    continue
                # 2. Draw as in `open`, and look again.
                luck = 2.0 * draw()
                believed = luck < 1.0
                spread = 1.0 + most * (luck if believed else luck - 1.0)
                if rate_s * spread >= best_rate_s[end] and (link_s + rate_s) * spread >= best_one_s[end]:
                    continue
                # 3. Pass over who cannot serve, or is asked separately.
                room, expires_at, block_s, _, _, queue_s, residual_s, record = offer
                if room < room_needed or expires_at <= now or peer in known:
                    continue
                # 4. What it really asks.
                rate_s += chunks * block_s
                fixed_s = link_s + queue_s + steps * residual_s
                if not believed:
                    fixed_s, rate_s = max(fixed_s, link_s + typical_wait_s), max(rate_s, typical_rate_s)
                fixed_s *= spread
                rate_s *= spread
                # 5. Whoever is not beaten is heard.
                if rate_s >= best_rate_s[end] and fixed_s + rate_s >= best_one_s[end]:
                    continue
                bid = Bid(fixed_s, rate_s, end, spread, record)
                if not rivals.beat(bid):
                    rivals.add(bid)
                    heard.append(bid)
        return heard
