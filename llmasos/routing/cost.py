"""Seconds that a hop will take. Every number a route is chosen by is made here, and can be explained.

For a request of `p` prompt rows and `n` further ones, over `L` blocks of a peer whose span has `S`:

    link     (1 + n) · (rtt + HOP_S) + (p + n) · row_bytes / bandwidth           the way in and out, once a step
    compute  L · (n · block_s + chunks · block_s + p · row_s)                    alone on the machine
    wait     queue_s + n · residual_s + L · n · active · CROWD_ROWS · row_s      what others there have announced
    own      the same for sessions of ours that the record cannot show yet, as far as others of ours will follow them
    risk     FAILOVER_S · (its recent failures + n · what share of steps a hop is lost at, by all that we have seen)
    doubt    what a claim costs more because we did not believe it this time

All of it is `fixed_s + L · block_s`, which is what makes planning fast.

Nobody knows how far peers are from one another. A peer that is far from us is taken to be as far from the hops beside
it, which is right for one far hop among near ones: it costs both ways. Two far hops that are neighbours are charged for
a way that they do not need, which keeps routes together where we are (docs/simulator.md says what it gains).

**How far a claim is believed.** What we have seen outweighs what is claimed as the evidence grows: after `PRIOR` steps
they count the same. A peer that we have never used is believed in every other plan; in the rest it counts as no better
than the typical peer. So a liar gets about half of the newcomers' first sessions at most, and none after that.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from llmasos.config import ClientConfig
from llmasos.routing.records import PeerRecord

DEFAULT_RTT_S = 0.05
"""Round trip to a peer that nobody has measured: across a continent it takes 30 to 60 ms."""
DEFAULT_BANDWIDTH_BYTES_PER_S = 12.5e6
"""100 Mbit/s, the upload of a good home connection; a data centre has a hundred times that."""
DEFAULT_ROW_BYTES = 4_096
"""Activation of one token: hidden 2,048 in bfloat16, or 1,024 in float32."""
HOP_S = 0.001
"""What a hop costs a step beyond link and blocks: two passes through an event loop and a raw stream (echo of one
activation 0.15 - 0.25 ms, measured), and a hand-over to the compute thread."""
FAILOVER_S = 1.0
"""Lost when a hop dies: noticing, planning, replaying. Petals, repaired, needs 0.4 s at best (measured)."""
PROMPT_CHUNK_TOKENS = ClientConfig().prompt_chunk_tokens
CROWD_ROWS = 8.0
"""Rows that each other session on a peer is taken to add to a step of ours: one of its own, and for the rest the
prompts that come with it, whose passes hold up everybody. Best of 1, 3, 8 and 16 in the simulator (docs/log.md)."""
PRIOR = 8.0
"""Steps observed that weigh as much as the claim itself: two bursts of tokens tell more than an advertisement."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks of each block, whoever serves it."""

    prompt_tokens: int
    new_tokens: int
    row_bytes: int = DEFAULT_ROW_BYTES
    chunks: int = field(init=False)
    transfer_s: float = field(init=False)
    """Of all its rows into one hop."""

    def __post_init__(self) -> None:  # once here, and not for each of a thousand peers
        rows = self.prompt_tokens + self.new_tokens
        object.__setattr__(self, "chunks", -(-self.prompt_tokens // PROMPT_CHUNK_TOKENS))
        object.__setattr__(self, "transfer_s", rows * self.row_bytes / DEFAULT_BANDWIDTH_BYTES_PER_S)

    def link_s(self, rtt_s: float) -> float:
        """Seconds on the way into one hop and out of it, all steps together."""
        return self.trips_s(rtt_s + HOP_S) + self.transfer_s

    def trips_s(self, trip_s: float) -> float:
        """Seconds of as many ways into a hop and out of it as there are steps."""
        return (1 + self.new_tokens) * trip_s

    def risk_s(self, losses_per_step: float) -> float:
        """Seconds that a hop more is expected to cost in failovers: of two routes as fast the shorter one is better."""
        return self.new_tokens * losses_per_step * FAILOVER_S


class Offer(NamedTuple):
    """A record as the planner reads it: what does not depend on the request, computed once when it arrives."""

    kv_free_tokens: int
    expires_at: float
    block_s: float
    row_s: float
    step_s: float
    """One block for one decoding row, in the batch that it would join."""
    queue_s: float
    """Work announced as waiting; it comes first, once."""
    residual_s: float
    """Expected rest of the pass that is running when a step arrives; every step."""
    record: PeerRecord


def make_offer(record: PeerRecord, expires_at: float) -> Offer:
    """What `record` claims, until `expires_at`."""
    step_s = step_seconds(record)
    return Offer(
        record.kv_free_tokens,
        expires_at,
        record.block_seconds,
        record.row_seconds,
        step_s,
        record.queue_seconds,
        residual_s(step_s, record.active_sessions, len(record.span), record.model_blocks),
        record,
    )


def step_seconds(record: PeerRecord) -> float:
    """One block for one decoding row, beside the rows of all sessions that are there."""
    return record.block_seconds + record.active_sessions * CROWD_ROWS * record.row_seconds


def residual_s(step_s: float, sessions: float, span_blocks: int, model_blocks: int) -> float:
    """A step arrives in the middle of somebody's pass on average, if there is one: likelier with more sessions, and
    with more of the blocks, as each session is at one peer at a time.
    """
    busy = sessions * span_blocks / model_blocks
    return 0.5 * step_s * span_blocks * busy / (busy + 1)


@dataclass(frozen=True, slots=True)
class Load:
    """What a peer said when it was asked how busy it is."""

    sessions: int
    queued_tokens: int
    kv_free_tokens: int
    seen_at: float


class Observed(NamedTuple):
    """What we know of a peer first-hand; the defaults know nothing. See `health.Health.observed`."""

    rtt_s: float = DEFAULT_RTT_S
    block_s: float = 0.0
    """Seconds of one block for one decoding row, waiting included; meaningless without evidence."""
    evidence: float = 0.0
    """Steps it was learned from, faded with time."""
    failures: float = 0.0
    """Recent ones; each counts for less as time goes on."""
    own_sessions: int = 0
    """Sessions of ours that began after the record was made, or after `load` was seen."""
    own_tokens: int = 0
    """The kv room that those have reserved."""
    company: float = 1.0
    """How many sessions of ours one of ours has beside it, at most one: whether another follows the one that ends."""
    load: Load | None = None
    """What it told us itself since its record was made."""
    hoped_rtt_s: float = DEFAULT_RTT_S
    """What a round trip may be by now, for plans that are hopeful."""
    losses_per_step: float = 0.0
    """How often a hop is lost, of any peer."""

    @property
    def weight(self) -> float:
        """How much what we saw counts against what is claimed, 0 to 1."""
        return self.evidence / (self.evidence + PRIOR)

    @property
    def proven(self) -> bool:
        """Whether we rather go by what we saw."""
        return self.evidence >= PRIOR


UNKNOWN = Observed()


@dataclass(frozen=True, slots=True)
class HopCost:
    """Where the seconds of one hop go, for the whole of a request."""

    link_s: float = 0.0
    compute_s: float = 0.0
    wait_s: float = 0.0
    own_s: float = 0.0
    risk_s: float = 0.0
    doubt_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.link_s + self.compute_s + self.wait_s + self.own_s + self.risk_s + self.doubt_s


NO_COST = HopCost()


_Shares = tuple[float, float, float, float, float, float, float]
"""What a hop costs once: link, wait, own, risk; and for each block: compute, wait, own."""


def _shares(record: PeerRecord, work: Work, observed: Observed) -> _Shares:
    seen, load, own, company = observed.weight, observed.load, observed.own_sessions, observed.company
    block_s, row_s, span_blocks, n = record.block_seconds, record.row_seconds, len(record.span), work.new_tokens
    sessions = record.active_sessions if load is None else load.sessions
    queued_tokens = record.queued_tokens if load is None else load.queued_tokens
    crowd_s = CROWD_ROWS * row_s
    step_s = block_s + sessions * crowd_s
    # What we saw scales the claim as a whole, and already contains the waiting that it was seen with.
    scale = 1.0 - seen + seen * observed.block_s / step_s
    model_blocks = record.model_blocks
    wait_s = residual_s(step_s * scale, sessions, span_blocks, model_blocks)
    own_s = own_step_s = 0.0
    if own:
        # One of ours that runs there now is halfway through on average, and leaves us alone then unless others follow;
        # only with those come prompts.
        beside = own * (1.0 + company) / 2
        own_step_s = (beside + own * company * (CROWD_ROWS - 1.0)) * row_s * scale
        own_s = residual_s(step_s * scale + own_step_s, sessions + beside, span_blocks, model_blocks) - wait_s
    return (
        work.link_s(observed.rtt_s),
        (1.0 - seen) * (queued_tokens * row_s * span_blocks + n * wait_s),
        n * own_s,
        observed.failures * FAILOVER_S + work.risk_s(observed.losses_per_step),
        scale * ((n + work.chunks) * block_s + work.prompt_tokens * row_s),
        n * sessions * crowd_s * scale,
        n * own_step_s,
    )


def hop_cost(record: PeerRecord, blocks: int, work: Work, observed: Observed = UNKNOWN) -> HopCost:
    """What `blocks` blocks of this peer cost the request. Linear in `blocks`."""
    link_s, wait_s, own_s, risk_s, compute_block_s, wait_block_s, own_block_s = _shares(record, work, observed)
    return HopCost(
        link_s=link_s,
        compute_s=blocks * compute_block_s,
        wait_s=wait_s + blocks * wait_block_s,
        own_s=own_s + blocks * own_block_s,
        risk_s=risk_s,
    )


def hop_price(record: PeerRecord, work: Work, observed: Observed = UNKNOWN) -> tuple[float, float, float]:
    """The same as what the hop costs whatever it computes, what each block costs, and what of the first is the link."""
    link_s, wait_s, own_s, risk_s, compute_block_s, wait_block_s, own_block_s = _shares(record, work, observed)
    return link_s + wait_s + own_s + risk_s, compute_block_s + wait_block_s + own_block_s, link_s
