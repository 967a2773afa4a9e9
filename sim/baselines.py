"""Other ways to choose a route, to be run in the place of ours: same scenario, same seed, same peers and sessions.

What others do is written down from their descriptions, in their favour where they leave a choice: those that go by
distances are told the true ones, which ours has to measure. All of them avoid peers that have just failed, and never
mix numerics, as ours does: what differs is the choice.

    ours        the shipped planner and scout
    random      any peer that has the next block, to the end of its span
    pipelines   fixed chains of peers that share nobody, taken in turn
    in-flight   the peer with the fewest sessions, to the end of its span
    petals      the shortest path by round trips and announced speeds, not looking at load
    parallax    the shortest path by round trips and the latency of a block in the batch that it would join

`flow_rows_per_s` is no policy: it is what no router could exceed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from random import Random

from llmasos.client.router import Policy
from llmasos.errors import UsageError
from llmasos.routing.cost import step_seconds
from llmasos.routing.health import Health
from llmasos.routing.missing import missing_blocks, refusal
from llmasos.routing.planner import Hop, Route
from llmasos.routing.records import PeerRecord
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import Checkpoint, SwarmView
from llmasos.span import Span
from sim.regions import Map

POLICIES = ("ours", "random", "pipelines", "in-flight", "petals", "parallax")

Pick = Callable[[Sequence[PeerRecord], float, Random, Health], PeerRecord]


def make_policy(name: str, where: Map, home: str) -> Policy | None:
    """The policy of that name for the client `home`, None for the router's own.

    Raises UsageError for a name that is none of POLICIES.
    """
    match name:
        case "ours":
            return None
        case "random":
            return _Greedy(lambda options, now, rng, health: rng.choice(options))
        case "in-flight":
            return _Greedy(_fewest_in_flight)
        case "pipelines":
            return _Pipelines()
        case "petals":
            return _Shortest(where, home, lambda record: record.block_seconds)
        case "parallax":
            return _Shortest(where, home, step_seconds)
    raise UsageError(f"there is no policy {name!r}", hint=f"take one of {', '.join(POLICIES)}")


class _Baseline(ABC):
    """What all of them share: who may serve, and the error when nobody does."""

    def __call__(self, view: SwarmView, request: RouteRequest, now: float, rng: Random, health: Health) -> Route:
        assert request.model_blocks is not None, "sessions say how many blocks their model has"
        checkpoint = Checkpoint(request.digest, request.model_blocks)
        end = request.model_blocks if request.end is None else request.end
        able = [
            record
            for record, expires_at in view.leases(request.model).values()
            if refusal(record, expires_at, request, checkpoint, now, health) is None
        ]
        able.sort(key=lambda record: (record.span, record.peer))
        legs = self.choose(able, request.start, end, now, rng, health)
        if legs is None:
            raise missing_blocks(view, request, checkpoint, end, now, health)
        return Route(
            tuple(
                Hop(record.peer, span, record.addresses, dtype=record.dtype, quantization=record.quantization)
                for record, span in legs
            )
        )

    @abstractmethod
    def choose(
        self, able: Sequence[PeerRecord], start: int, end: int, now: float, rng: Random, health: Health
    ) -> list[tuple[PeerRecord, Span]] | None:
        """A chain over the blocks `[start, end)`; None when there is none."""


class _Greedy(_Baseline):
    """Hop by hop: one of those that have the next block, and all that it has."""

    def __init__(self, pick: Pick) -> None:
        self._pick = pick

    def choose(
        self, able: Sequence[PeerRecord], start: int, end: int, now: float, rng: Random, health: Health
    ) -> list[tuple[PeerRecord, Span]] | None:
        legs = []
        while start < end:
            options = [record for record in able if start in record.span]
            if not options:
                return None
            chosen = self._pick(options, now, rng, health)
            legs.append((chosen, Span(start, min(chosen.span.end, end))))
            start = legs[-1][1].end
        return legs


def _fewest_in_flight(options: Sequence[PeerRecord], now: float, rng: Random, health: Health) -> PeerRecord:
    def sessions(record: PeerRecord) -> int:
        return record.active_sessions + health.observed(record.peer, now, since=record.announced_at).own_sessions

    fewest = min(map(sessions, options))
    return rng.choice([record for record in options if sessions(record) == fewest])


class _Pipelines(_Baseline):
    """Each peer belongs to one chain; sessions go round the chains."""

    def __init__(self) -> None:
        self._turn: dict[tuple[int, int], int] = {}

    def choose(
        self, able: Sequence[PeerRecord], start: int, end: int, now: float, rng: Random, health: Health
    ) -> list[tuple[PeerRecord, Span]] | None:
        chains = []
        free = list(able)
        while (chain := self._next_chain(free, start, end)) is not None:
            chains.append(chain)
            taken = {record.peer for record, _ in chain}
            free = [record for record in free if record.peer not in taken]
        if not chains:
            return None
        # Each gateway begins somewhere else, or all of them would march in step.
        turn = self._turn.get((start, end), rng.randrange(len(chains)))
        self._turn[start, end] = turn + 1
        return chains[turn % len(chains)]

    def _next_chain(self, free: Sequence[PeerRecord], start: int, end: int) -> list[tuple[PeerRecord, Span]] | None:
        legs: list[tuple[PeerRecord, Span]] = []
        while start < end:
            options = [record for record in free if start in record.span]
            if not options:
                return None
            farthest = max(options, key=lambda record: record.span.end)  # the first of those that reach as far
            legs.append((farthest, Span(start, min(farthest.span.end, end))))
            start = legs[-1][1].end
        return legs


class _Shortest(_Baseline):
    """The path of the fewest seconds for one row, over pairs of a block and a peer; distances are the true ones."""

    def __init__(self, where: Map, home: str, block_s: Callable[[PeerRecord], float]) -> None:
        self._where = where
        self._home = home
        self._block_s = block_s

    def choose(
        self, able: Sequence[PeerRecord], start: int, end: int, now: float, rng: Random, health: Health
    ) -> list[tuple[PeerRecord, Span]] | None:
        # Peers of one place are equally far from everywhere: of those that leave a block, the cheapest of each place
        # is all that the next hop has to look at.
        cost: dict[str, tuple[float, PeerRecord, int]] = {}  # by peer: seconds up to here, and where it was entered
        exits: list[dict[str, tuple[float, PeerRecord, int]]] = []
        for block in range(start, end):
            arriving: dict[str, tuple[float, PeerRecord, int]] = {}
            for record in able:
                if block not in record.span:
                    continue
                staying = cost.get(record.peer)
                entered = (self._way_in(exits, record, block == start), record, block)
                best = entered if staying is None or entered[0] < staying[0] else staying
                if best[0] < float("inf"):
                    arriving[record.peer] = (best[0] + self._block_s(record), best[1], best[2])
            if not arriving:
                return None
            cost = arriving
            nearest: dict[str, tuple[float, PeerRecord, int]] = {}
            for peer, reached in arriving.items():
                place = str(self._where.place_of(peer))
                if place not in nearest or reached[0] < nearest[place][0]:
                    nearest[place] = reached
            exits.append(nearest)
        legs: list[tuple[PeerRecord, Span]] = []
        at = end
        best_exit = min(exits[-1].values(), key=lambda reached: reached[0] + self._home_s(reached[1]))
        while True:
            _, record, entered_at = best_exit
            legs.append((record, Span(entered_at, at)))
            at = entered_at
            if at == start:
                return legs[::-1]
            best_exit = self._before(exits[at - start - 1], record)

    def _way_in(self, exits: list[dict[str, tuple[float, PeerRecord, int]]], record: PeerRecord, first: bool) -> float:
        if first:
            return self._home_s(record)
        before = self._before(exits[-1], record)
        return before[0] + self._where.rtt_s(before[1].peer, record.peer) / 2

    def _before(
        self, exits: dict[str, tuple[float, PeerRecord, int]], record: PeerRecord
    ) -> tuple[float, PeerRecord, int]:
        return min(exits.values(), key=lambda exit: exit[0] + self._where.rtt_s(exit[1].peer, record.peer) / 2)

    def _home_s(self, record: PeerRecord) -> float:
        return self._where.rtt_s(self._home, record.peer) / 2


def flow_rows_per_s(peers: Sequence[tuple[Span, float]], blocks: int) -> float:
    """The most rows a second that any router could send through: (span, block-rows a second) of each peer.

    A row needs every block once, a peer spends on a row what its blocks take: this is a maximum flow from peers to
    blocks. Spans are ranges, so for a given rate it is decided by taking, for each block in turn, those peers first
    whose span ends first; the largest rate that works is found by halving.
    """
    if not peers:
        return 0.0
    together: dict[Span, float] = {}
    for span, capacity in peers:
        together[span] = together.get(span, 0.0) + capacity
    order = sorted(together.items(), key=lambda group: (group[0].end, group[0].start))
    low, high = 0.0, sum(rate for _, rate in peers) / blocks
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _carries(order, blocks, middle) else (low, middle)
    return low


def _carries(order: Sequence[tuple[Span, float]], blocks: int, rate: float) -> bool:
    left = [capacity for _, capacity in order]
    for block in range(blocks):
        wanted = rate
        for index, (span, _) in enumerate(order):
            if left[index] > 0.0 and span.start <= block < span.end:
                taken = min(left[index], wanted)
                left[index] -= taken
                wanted -= taken
                if wanted <= 0.0:
                    break
        if wanted > 1e-9 * rate:
            return False
    return True
