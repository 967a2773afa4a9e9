"""SwarmView: a fold of records into what a client or a peer knows of the swarm.

One record per peer and model; of two the newer incarnation wins, then the later announcement, so the order in which
they arrive does not matter. Nothing here looks at a clock: `expire(now)` is told the time.

Anybody can announce a model under any digest. So the records of a model are kept apart by *checkpoint* (digest and
number of blocks), and what is said of a model as a whole is said of the checkpoint that most peers serve.

Beside the records the view keeps, per checkpoint and numerics, a `Pool` of offers: the ONLINE records in the form that
the planner reads, by start and speed. That is the incremental part: a record is digested once, when it arrives.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmasos.config import LEASE_S, MAX_LEASE_S
from llmasos.routing.cost import Offer, Work, make_offer, step_seconds
from llmasos.routing.records import PeerRecord, PeerState
from llmasos.span import Span, gaps

MAX_RECORDS = 100_000
"""Records held, about 2 kB each; beyond it newcomers wait until others expire. Ten times the largest tested swarm."""


SAMPLE = 255
"""Offers looked at to tell what is typical: its median is then within 3 % of the true rank, two times in three."""


class Checkpoint(NamedTuple):
    """Weights that can be chained: the same digest of a model of so many blocks."""

    digest: str
    blocks: int


Ranked = tuple[float, str, int, float, Offer]
"""(`step_s`, peer, end, `row_s`, offer): sorts by speed, and equals by their id, so that no order depends on arrival.
What most offers are passed over for stands here again, because a pointer followed costs more than a sum."""


class Numerics(NamedTuple):
    """How a peer computes. A route never mixes them unless that is asked for."""

    dtype: str
    quantization: str


@dataclass(slots=True)
class Pool:
    """The offers of one checkpoint in one kind of numerics: by their first block, the fastest first."""

    starts: dict[int, list[Ranked]] = field(default_factory=dict)
    size: int = 0
    _typical: tuple[Work, float, float] | None = None  # what was asked for since the last change

    def __len__(self) -> int:
        return self.size

    def offers(self, stride: int = 1) -> Iterator[Offer]:
        """Each `stride`-th of all, in an order that does not depend on how they came."""
        skip = 0
        for _, ranked in sorted(self.starts.items()):
            for entry in ranked[skip::stride]:
                yield entry[-1]
            skip = (skip - len(ranked)) % stride

    def typical(self, work: Work) -> tuple[float, float]:
        """The waiting in the middle of what is claimed, and the price per block; of two the higher. Seconds."""
        if self._typical is None or self._typical[0] != work:
            sample = list(self.offers(max(1, self.size // SAMPLE)))
            steps, prompt, chunks = work.new_tokens, work.prompt_tokens, work.chunks
            wait_s = sorted([offer.queue_s + steps * offer.residual_s for offer in sample])
            rate_s = sorted([steps * offer.step_s + chunks * offer.block_s + prompt * offer.row_s for offer in sample])
            middle = len(sample) // 2
            self._typical = (work, wait_s[middle], rate_s[middle]) if sample else (work, 0.0, 0.0)
        return self._typical[1:]

    def add(self, offer: Offer) -> None:
        """Take in an offer of a peer that has none here."""
        self._typical = None
        insort(self.starts.setdefault(offer.record.span.start, []), _ranked(offer))
        self.size += 1

    def remove(self, record: PeerRecord) -> None:
        """Drop the offer that was made of this record."""
        self._typical = None
        ranked = self.starts[record.span.start]
        del ranked[bisect_left(ranked, (step_seconds(record), record.peer))]
        self.size -= 1
        if not ranked:
            del self.starts[record.span.start]

    def replace(self, record: PeerRecord, offer: Offer) -> None:
        """Put an offer in the place of the one that was made of this record of the same peer."""
        span, old_s = record.span, step_seconds(record)
        if offer.record.span != span or offer.step_s != old_s:
            self.remove(record)
            self.add(offer)
            return
        self._typical = None
        ranked = self.starts[span.start]
        ranked[bisect_left(ranked, (old_s, record.peer))] = _ranked(offer)


class Lease(NamedTuple):
    """What a peer last announced for a model, and when that expires (network time)."""

    record: PeerRecord
    expires_at: float


class SwarmView:
    """What is known of a swarm. Changed by `add`, `remove` and `expire` only."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, Lease]] = {}
        self._pools: dict[str, dict[Checkpoint, dict[Numerics, Pool]]] = {}
        self._census: dict[str, Counter[Checkpoint]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    # --- events -------------------------------------------------------------------------------------------------------

    def add(self, record: PeerRecord, expires_at: float | None = None) -> bool:
        """Take a record in. False when what is known of that peer is newer, or there is no room.

        `expires_at` (network time) is the registry's word on its lease; it never outlives MAX_LEASE_S.
        """
        known = self._models.get(record.model, {}).get(record.peer)
        if known is None and self._size >= MAX_RECORDS:
            return False
        lease_ends = record.announced_at + LEASE_S if expires_at is None else expires_at
        lease_ends = min(lease_ends, record.announced_at + MAX_LEASE_S)
        if known is not None:
            if known.record is record and known.expires_at == lease_ends:
                return True
            if known.record.recency > record.recency:
                return False
            if _place(known.record) == _place(record):  # as it nearly always is: only the numbers are new
                self._models[record.model][record.peer] = Lease(record, lease_ends)
                if record.state is PeerState.ONLINE:
                    pool = self._pools[record.model][_checkpoint(record)][_numerics(record)]
                    pool.replace(known.record, make_offer(record, lease_ends))
                return True
            self.remove(record.peer, record.model)
        self._models.setdefault(record.model, {})[record.peer] = Lease(record, lease_ends)
        self._size += 1
        self._census.setdefault(record.model, Counter())[_checkpoint(record)] += 1
        if record.state is PeerState.ONLINE:
            pools = self._pools.setdefault(record.model, {}).setdefault(_checkpoint(record), {})
            pool = pools.setdefault(_numerics(record), Pool())
            pool.add(make_offer(record, lease_ends))
        return True

    def remove(self, peer: str, model: str | None = None) -> None:
        """Forget a peer, for one model or for all. Unknown ones are no error."""
        for name in [model] if model is not None else list(self._models):
            entries = self._models.get(name, {})
            entry = entries.pop(peer, None)
            if entry is None:
                continue
            self._size -= 1
            self._forget(entry.record)
            if not entries:
                del self._models[name], self._census[name]

    def expire(self, now: float) -> list[PeerRecord]:
        """Forget what has outlived its lease; returns it."""
        dead = [
            entry.record for entries in self._models.values() for entry in entries.values() if entry.expires_at <= now
        ]
        for record in dead:
            self.remove(record.peer, record.model)
        return dead

    def _forget(self, record: PeerRecord) -> None:
        """Undo what `add` noted beside the record itself; empty containers go, so that memory follows the swarm."""
        model, checkpoint, numerics = record.model, _checkpoint(record), _numerics(record)
        census = self._census[model]
        census[checkpoint] -= 1
        if not census[checkpoint]:
            del census[checkpoint]
        if record.state is not PeerState.ONLINE:
            return
        pools = self._pools[model][checkpoint]
        pools[numerics].remove(record)
        if not pools[numerics]:
            del pools[numerics]
        if not pools:
            del self._pools[model][checkpoint]
        if not self._pools[model]:
            del self._pools[model]

    # --- questions ----------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """The models that somebody announces, sorted."""
        return sorted(self._models)

    def record(self, peer: str, model: str) -> PeerRecord | None:
        """What a peer last announced for a model."""
        entry = self._models.get(model, {}).get(peer)
        return entry.record if entry else None

    def peers(self, model: str) -> list[PeerRecord]:
        """Every record of a model, whatever its state and checkpoint, in the order of their blocks."""
        records = [entry.record for entry in self._models.get(model, {}).values()]
        return sorted(records, key=lambda record: (record.span, record.peer))

    def leases(self, model: str) -> Mapping[str, Lease]:
        """Every record of a model and when it expires, by peer."""
        return self._models.get(model, {})

    def checkpoint(self, model: str, digest: str | None = None) -> Checkpoint | None:
        """What most peers of the model (or of that digest) serve; None when nobody does."""
        census = self._census.get(model, Counter())
        matching = [key for key in census if digest is None or key.digest == digest]
        return min(matching, key=lambda key: (-census[key], key), default=None)

    def checkpoints(self, model: str) -> list[Checkpoint]:
        """What is announced under the name of the model, sorted."""
        return sorted(self._census.get(model, ()))

    def pools(self, model: str, checkpoint: Checkpoint) -> dict[Numerics, Pool]:
        """The offers that a route can be made of."""
        return self._pools.get(model, {}).get(checkpoint, {})

    def serving(self, model: str, block: int, digest: str | None = None) -> list[PeerRecord]:
        """The ONLINE peers that serve one block."""
        return [record for record in self._online(model, digest) if block in record.span]

    def coverage(self, model: str, digest: str | None = None) -> list[int]:
        """How many ONLINE peers serve each block; empty for an unknown model."""
        checkpoint = self.checkpoint(model, digest)
        if checkpoint is None:
            return []
        steps = [0] * (checkpoint.blocks + 1)
        for record in self._online(model, digest):
            steps[record.span.start] += 1
            steps[record.span.end] -= 1
        counts, running = [], 0
        for step in steps[:-1]:
            running += step
            counts.append(running)
        return counts

    def missing(self, model: str, digest: str | None = None) -> list[Span]:
        """The ranges of blocks that no ONLINE peer serves; empty for an unknown model, whose size nobody knows.

        Peers of different numbers do not complete each other, as no route mixes them: it is what those numbers lack
        that lack the least.
        """
        checkpoint = self.checkpoint(model, digest)
        if checkpoint is None:
            return []
        lacking = [self.lacking(model, checkpoint, numerics) for numerics in sorted(self.pools(model, checkpoint))]
        return min(lacking, key=lambda spans: sum(map(len, spans)), default=[Span(0, checkpoint.blocks)])

    def lacking(self, model: str, checkpoint: Checkpoint, numerics: Numerics) -> list[Span]:
        """The ranges of blocks of one checkpoint that no ONLINE peer with these numbers serves."""
        pool = self.pools(model, checkpoint).get(numerics, Pool())
        return gaps((offer.record.span for offer in pool.offers()), checkpoint.blocks)

    def _online(self, model: str, digest: str | None) -> list[PeerRecord]:
        checkpoint = self.checkpoint(model, digest)
        if checkpoint is None:
            return []
        return [offer.record for pool in self.pools(model, checkpoint).values() for offer in pool.offers()]


def status(view: SwarmView, now: float) -> dict[str, Any]:
    """The object of `llmasos status --json` and of the gateway's `/api/swarm`."""
    described = [_model_status(view, model, now) for model in view.models()]
    return {"models": [model for model in described if model["peers"]]}


def _model_status(view: SwarmView, model: str, now: float) -> dict[str, Any]:
    checkpoint = view.checkpoint(model)
    missing = view.missing(model)
    return {
        "model": model,
        "blocks": checkpoint.blocks if checkpoint else 0,
        "covered": not missing,
        "missing": [str(span) for span in missing],
        "peers": [
            {
                "peer": record.peer,
                "name": record.name,
                "blocks": str(record.span),
                "state": str(record.state),
                "throughput": record.throughput,
                "load": record.load,
                "kv_free_tokens": record.kv_free_tokens,
                "dtype": record.dtype,
                "quantization": record.quantization,
                "version": record.version,
                "age_s": record.age(now),
            }
            for record in view.peers(model)
            if record.state != PeerState.OFFLINE  # it said goodbye; its record only waits for its lease to end
        ],
    }


def _ranked(offer: Offer) -> Ranked:
    return offer.step_s, offer.record.peer, offer.record.span.end, offer.row_s, offer


def _place(record: PeerRecord) -> tuple[object, ...]:
    """Where the view keeps it."""
    return record.state, record.digest, record.model_blocks, record.dtype, record.quantization


def _checkpoint(record: PeerRecord) -> Checkpoint:
    return Checkpoint(record.digest, record.model_blocks)


def _numerics(record: PeerRecord) -> Numerics:
    return Numerics(record.dtype, record.quantization)
