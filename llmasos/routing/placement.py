"""Which blocks a new peer should serve (`--blocks auto`).

A swarm is as fast as its weakest block: the one whose peers together make the fewest rows a second. So the newcomer
takes the range that leaves the weakest block strongest, then the second weakest, and so on. Peers that are still
joining count as well, since they have already chosen.

Where several ranges are equally good - always so in an empty swarm - those that leave the fewest peers still needed
are preferred, and among them the choice is random: peers that start together should not all choose the same one.
"""

from collections.abc import Iterator
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
    strength = _strength(
        [
            record
            for record, expires_at in view.leases(model)
            if expires_at > now
            and record.state in (PeerState.ONLINE, PeerState.JOINING)
            and record.peer != me
            and record.model_blocks == model_blocks
            and digest in (None, record.digest)
            and numerics in (None, Numerics(record.dtype, record.quantization))
        ],
        model_blocks,
        throughput,
    )
    starts = range(model_blocks - length + 1)
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
