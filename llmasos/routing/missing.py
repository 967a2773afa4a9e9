"""Why there is no route: which blocks nobody can serve, and what stands in the way of each peer that has them.

`refusal` is the one place that says whether a peer may serve a request; the planner's inner loop repeats its
comparisons for speed, and a test holds the two together.
"""

from collections import Counter
from collections.abc import Iterable

from llmasos.errors import MissingBlocksError
from llmasos.routing.cost import Observed
from llmasos.routing.health import Health
from llmasos.routing.records import PeerRecord, PeerState
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import Checkpoint, Numerics, SwarmView
from llmasos.span import Span, gaps


def refusal(
    record: PeerRecord,
    expires_at: float,
    request: RouteRequest,
    checkpoint: Checkpoint,
    now: float,
    health: Health,
    seen: Observed | None = None,
) -> str | None:
    """Why this peer may not serve the request, in a word or two; None when it may. The first reason counts.

    `seen` is what `health` knows of it, for whoever has asked already.
    """
    if expires_at <= now:
        return "gone"
    if record.state is not PeerState.ONLINE:
        return str(record.state)
    if record.peer in request.exclude:
        return "excluded"
    if request.pin and record.peer not in request.pin:
        return "not pinned"
    if (record.digest, record.model_blocks) != checkpoint:
        return "of another checkpoint"
    if not request.allows(record.dtype, record.quantization):
        return f"serving {_text(record.dtype, record.quantization)}"
    seen = seen or health.observed(record.peer, now, since=record.announced_at)
    free_tokens = record.kv_free_tokens if seen.load is None else seen.load.kv_free_tokens
    if free_tokens - seen.own_tokens < request.kv_tokens:
        return "full"
    if not request.pin and health.avoided_for(record.peer, now) > 0:
        return "failed a moment ago"
    return None


def missing_blocks(
    view: SwarmView, request: RouteRequest, checkpoint: Checkpoint, end: int, now: float, health: Health
) -> MissingBlocksError:
    """The error to raise when `plan` finds no chain; names the gaps of the numerics that come closest."""
    verdicts = [
        (record, refusal(record, expires_at, request, checkpoint, now, health))
        for record, expires_at in view.leases(request.model).values()
    ]
    usable: dict[Numerics | None, list[Span]] = {None: []} if request.mixed else {}
    for record, problem in verdicts:
        if problem is None:
            key = None if request.mixed else Numerics(record.dtype, record.quantization)
            usable.setdefault(key, []).append(record.span)
    wanted = Span(request.start, end)
    closest, missing = min(
        ((key, _gaps_within(spans, wanted)) for key, spans in usable.items()),
        key=lambda found: (sum(map(len, found[1])), str(found[0])),
        default=(None, [wanted]),
    )
    why = "; ".join(f"{gap}: {_reasons(verdicts, gap, closest)}" for gap in missing)
    return MissingBlocksError(request.model, [str(gap) for gap in missing], why=why)


def _gaps_within(spans: Iterable[Span], wanted: Span) -> list[Span]:
    found = gaps(spans, wanted.end)
    return [Span(max(gap.start, wanted.start), gap.end) for gap in found if gap.end > wanted.start]


def _reasons(verdicts: Iterable[tuple[PeerRecord, str | None]], gap: Span, closest: Numerics | None) -> str:
    """`2 full, 1 draining`, of the peers that serve some block of the gap."""
    within = [
        (record, problem) for record, problem in verdicts if record.span.start < gap.end and gap.start < record.span.end
    ]
    if not within:
        return "nobody serves them"
    # no problem of its own, and yet of no use: it computes in other numerics than the rest of the route
    reasons = Counter(problem or f"serving {_text(record.dtype, record.quantization)}" for record, problem in within)
    others = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    mismatch = any(problem is None for _, problem in within)
    return f"{others}, the rest being {_text(*closest)}" if closest and mismatch else others


def _text(dtype: str, quantization: str) -> str:
    return dtype if quantization == "none" else f"{dtype} {quantization}"
