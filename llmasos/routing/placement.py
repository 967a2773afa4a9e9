"""Which blocks a peer should serve (`--blocks auto`), and when it should move to others.

A swarm is as fast as its weakest block: the one whose peers together make the fewest rows a second. So the newcomer
takes the range that leaves the weakest block strongest, then the second weakest, and so on. Peers that are still
joining count as well, since they have already chosen.

Where several ranges are equally good - always so in an empty swarm - those that leave the fewest peers still needed
are preferred, and among them the choice is random: peers that start together should not all choose the same one.

A peer that serves moves for one of two reasons: blocks that nobody serves, which is urgent; or blocks that would be far
weaker even with it than those that it leaves behind without it. Both leave the swarm's strengths, sorted, better than
they were, so a swarm whose peers stay cannot move for ever; the factor between "weaker" and "far weaker" keeps it from
moving for little.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from statistics import median_low

from llmasos.errors import UsageError
from llmasos.routing.records import PeerRecord, PeerState
from llmasos.routing.view import Numerics, SwarmView
from llmasos.span import Span

CREDIT = 4.0
"""A claimed throughput counts up to so many times the median (ours included), so that one liar cannot keep a range to
itself: its blocks look strong, but never out of reach. Machines of one kind differ less; a lone GPU among CPUs is
undervalued, which costs a spare replica beside it."""
HYSTERESIS = 1.25
"""A move must leave behind blocks that are stronger, by this factor, than those that it strengthens are afterwards:
measured speeds repeat within 10 - 20 % on a shared machine."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where a peer should serve instead. `movers` estimates how many others could say the same of themselves."""

    span: Span
    urgent: bool
    movers: int


def choose_span(
    view: SwarmView,
    model: str,
    model_blocks: int,
    max_blocks: int,
    throughput: float,
    now: float,
    rng: Random,
    *,
    digest: str | None = None,
    numerics: Numerics | None = None,
    me: str | None = None,
) -> Span:
    """The range of at most `max_blocks` blocks that raises the weakest block the most.

    `throughput` is the newcomer's own, rows per second through such a range. `digest` and `numerics` restrict who
    counts to those that its blocks can be chained with; `me` leaves out its own former record.
    """
    if max_blocks < 1:
        raise UsageError("there is no room for a single block", hint="free some memory, or use --quantize int4")
    length = min(max_blocks, model_blocks)
    strength = _strength(_counted(view, model, model_blocks, now, digest, numerics, me), model_blocks, throughput)
    return _best(strength, length, throughput, rng)


def better_span(view: SwarmView, record: PeerRecord, now: float, rng: Random) -> Move | None:
    """Where the peer of `record`, which serves, would be of so much more use that it should move there; None if it
    should stay.
    """
    numerics = Numerics(record.dtype, record.quantization)
    others = _counted(view, record.model, record.model_blocks, now, record.digest, numerics, record.peer)
    strength = _strength(others, record.model_blocks, record.throughput)
    span = _best(strength, len(record.span), record.throughput, rng)
    left = [strength[block] for block in record.span.blocks() if block not in span]
    weak = [strength[block] for block in span.blocks() if block not in record.span]
    if not weak or min(left) == 0.0:
        return None
    urgent = min(weak) == 0.0
    if not urgent and min(left) < HYSTERESIS * (min(weak) + record.throughput):
        return None
    spare = sum(1 for other in others if min(strength[block] for block in other.span.blocks()) > other.throughput)
    return Move(span, urgent, movers=1 + spare)


def _counted(
    view: SwarmView,
    model: str,
    model_blocks: int,
    now: float,
    digest: str | None,
    numerics: Numerics | None,
    me: str | None,
) -> list[PeerRecord]:
    """The records of those who serve, or are about to, what our blocks can be chained with."""
    return [
        record
        for record, expires_at in view.leases(model).values()
        if expires_at > now
        and record.state in (PeerState.ONLINE, PeerState.JOINING)
        and record.peer != me
        and record.model_blocks == model_blocks
        and digest in (None, record.digest)
        and numerics in (None, Numerics(record.dtype, record.quantization))
    ]


def _best(strength: list[float], length: int, throughput: float, rng: Random) -> Span:
    """The range that leaves the weakest blocks strongest."""
    starts = range(len(strength) - length + 1)
    outcomes = [_with_newcomer(strength, start, length, throughput) for start in starts]
    best = max(map(sorted, outcomes))
    equal = [start for start in starts if sorted(outcomes[start]) == best]
    needed = {start: _peers_needed(outcomes[start], length) for start in equal}
    start = rng.choice([start for start in equal if needed[start] == min(needed.values())])
    return Span(start, start + length)


def _strength(records: list[PeerRecord], blocks: int, throughput: float) -> list[float]:
    """Rows per second of each block, all its peers together."""
    strength = [0.0] * blocks
    most = CREDIT * median_low([throughput, *(record.throughput for record in records)])
    for record in sorted(records, key=lambda record: record.peer):  # one order of summing, so that equals are equal
        for block in record.span.blocks():
            strength[block] += min(record.throughput, most)
    return strength


def _with_newcomer(strength: list[float], start: int, length: int, throughput: float) -> list[float]:
    end = start + length
    return strength[:start] + [rows + throughput for rows in strength[start:end]] + strength[end:]


def _peers_needed(strength: list[float], length: int) -> int:
    """How many more peers like this one the weakest blocks would take."""
    return sum(-(-run // length) for run in _runs(strength, min(strength)))


def _runs(strength: list[float], weakest: float) -> Iterator[int]:
    """The lengths of the runs of weakest blocks."""
    run = 0
    for rows in [*strength, float("inf")]:
        if rows == weakest:
            run += 1
        elif run:
            yield run
            run = 0
