"""The hops of a session, in the order of their blocks: who stands beside whom, and what is missing.

Bookkeeping only, nothing is sent here. What a hop ought to know of its neighbours follows from the list (`sides`), and
what it was last told stands with it (`HopLink.told`): whoever is told something else than it should know is told anew.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from llmasos.client.hop import HopLink
from llmasos.routing.planner import Route
from llmasos.span import Span, gaps
from llmasos.wire import Reroute

LINK_TIMEOUT_S = 1.5
"""Rows that one hop has sent and the next, which is idle, has not seen for so long are lost: a chunk of a prompt takes
a second on the slowest link that we reckon with (`SLOW_LINK_BYTES_PER_S`)."""


@dataclass(frozen=True, slots=True)
class HandOver:
    """A hop that drains, set aside until the newcomers in its place have caught up."""

    old: HopLink
    newcomers: list[HopLink]


class Hops:
    """What a session is routed through, and who waits aside."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._hops: list[HopLink] = []
        self._aside: list[HandOver] = []
        self._settled = False  # everybody was in order, and nothing has been mended since
        self._starving: dict[HopLink, tuple[int, float]] = {}  # the step that the next hop saw last, and since when

    def __iter__(self) -> Iterator[HopLink]:
        return iter(list(self._hops))

    def __len__(self) -> int:
        return len(self._hops)

    def __getitem__(self, index: int) -> HopLink:
        return self._hops[index]

    def __contains__(self, hop: HopLink) -> bool:
        return hop in self._hops

    @property
    def route(self) -> Route:
        """As it stands."""
        return Route(tuple(hop.plan for hop in self._hops))

    @property
    def everybody(self) -> list[HopLink]:
        """Those aside included."""
        return [*self._hops, *(pair.old for pair in self._aside)]

    @property
    def settled(self) -> bool:
        """Whether there is nothing to mend, as a glance tells: it is asked for each token."""
        return self._settled and all(hop.lost is None and not hop.cut_off and not hop.draining for hop in self._hops)

    def index(self, hop: HopLink) -> int:
        return self._hops.index(hop)

    def after(self, hop: HopLink) -> HopLink | None:
        """The next hop; None behind the last."""
        behind = self._hops.index(hop) + 1
        return self._hops[behind] if behind < len(self._hops) else None

    def missing(self) -> list[Span]:
        """The blocks that no hop in good standing has."""
        return gaps((hop.plan.span for hop in self._hops if hop.lost is None), self._blocks)

    def lagging(self) -> tuple[int, int] | None:
        """The first run of hops that have to catch up, as (index, count)."""
        flags = [hop.lagging for hop in self._hops]
        if True not in flags:
            return None
        first = flags.index(True)
        return first, next((n for n, flag in enumerate(flags[first:]) if not flag), len(flags) - first)

    def misinformed(self) -> list[HopLink]:
        """Those whose neighbours are not those that they know of."""
        return [hop for hop in self._hops if hop.told != self.sides(hop)]

    def cut_links(self, number: int, now: float) -> list[HopLink]:
        """Those whose rows do not arrive, to be asked while the step `number` is waited for, after each round of pings.

        The next hop has nothing to do and has not seen that step, nor others that were passed on to it, for a while.
        """
        starving: dict[HopLink, tuple[int, float]] = {}
        for hop, following in pairwise(self._hops):
            passed, accepted = hop.progress.passed, following.progress.accepted
            seen = -1 if accepted is None else accepted
            if passed is not None and seen < min(passed, number) and not following.progress.queued:
                before = self._starving.get(hop)
                starving[hop] = before if before is not None and before[0] == seen else (seen, now)
        self._starving = starving
        return [hop for hop, (_, since) in starving.items() if now - since >= LINK_TIMEOUT_S]

    def sides(self, hop: HopLink) -> Reroute:
        """From whom a hop takes steps and to whom it sends them, as the route stands."""
        index = self._hops.index(hop)
        before = self._hops[index - 1] if index else None
        after = self.after(hop)
        return Reroute(
            upstream=before.plan.peer if before is not None and not before.relay else None,
            downstream=after.as_next if after is not None and not hop.relay else None,
            relay=hop.relay,
        )

    # --- changes ------------------------------------------------------------------------------------------------------

    def clear(self) -> list[HopLink]:
        """Take everybody out; returns them."""
        everybody = self.everybody
        self._hops, self._aside, self._settled = [], [], False
        return everybody

    def drop_lost(self) -> list[HopLink]:
        """Take out those that are lost; returns them. Their neighbours relay no more."""
        lost = [hop for hop in self._hops if hop.lost is not None]
        for hop in lost:
            self._end_relays_beside(hop)
        self._hops = [hop for hop in self._hops if hop.lost is None]
        return lost

    def insert(self, newcomers: Iterable[HopLink]) -> None:
        """Put hops where blocks are missing."""
        self._hops = sorted([*self._hops, *newcomers], key=lambda hop: hop.plan.span)

    def begin_hand_over(self, old: HopLink, newcomers: list[HopLink]) -> None:
        """Put the newcomers in the place of `old`, which stands aside."""
        self._end_relays_beside(old)
        self._hops.remove(old)
        self.insert(newcomers)
        self._aside.append(HandOver(old, newcomers))

    def undo_hand_overs(self) -> list[HopLink]:
        """Where a newcomer is lost and the old hop still stands, put it back; returns those who leave for it.

        Nothing was answered meanwhile, so it lags behind in nothing.
        """
        self._settled = False  # something is about to be mended
        leaving: list[HopLink] = []
        for pair in list(self._aside):
            if pair.old.lost is None and any(hop.lost is not None for hop in pair.newcomers):
                self._aside.remove(pair)
                for hop in pair.newcomers:
                    if hop in self._hops:
                        self._end_relays_beside(hop)
                self._hops = [hop for hop in self._hops if hop not in pair.newcomers]
                self.insert([pair.old])
                leaving += pair.newcomers
        return leaving

    def end_hand_overs(self) -> list[HopLink]:
        """The newcomers have caught up, and all is in order; returns those who can go."""
        leaving = [pair.old for pair in self._aside]
        self._aside, self._settled = [], True
        return leaving

    def _end_relays_beside(self, hop: HopLink) -> None:
        """The link that was bridged is gone; the new one is tried directly."""
        index = self._hops.index(hop)
        for beside in self._hops[max(index - 1, 0) : index + 1]:
            beside.relay = False
