"""Records and swarms for the tests of routing. No two defaults are the same number."""

from random import Random
from typing import Any

from llmasos.routing.records import PeerRecord, PeerState
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import SwarmView
from llmasos.span import Span

NOW = 1_000.0


def a_record(peer: str = "alice", blocks: str = "0:12", **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "peer": peer,
        "name": f"{peer}'s machine",
        "model": "smollm2",
        "digest": "sha256:00ff",
        "model_blocks": 30,
        "span": Span.parse(blocks),
        "state": PeerState.ONLINE,
        "incarnation": 7,
        "announced_at": NOW - 3.0,
        "addresses": ("/ip4/10.0.0.1/tcp/4001",),
        "dtype": "float32",
        "version": "0.1.0",
        "block_seconds": 0.0007,
        "row_seconds": 0.0002,
        "throughput": 110.0,
        "kv_free_tokens": 4_000,
        "kv_total_tokens": 5_000,
    }
    return PeerRecord(**fields | changes)


def a_view(*records: PeerRecord) -> SwarmView:
    view = SwarmView()
    for record in records:
        view.add(record)
    return view


def a_request(**changes: Any) -> RouteRequest:
    fields: dict[str, Any] = {
        "model": "smollm2",
        "digest": "sha256:00ff",
        "prompt_tokens": 40,
        "new_tokens": 60,
        "kv_tokens": 100,
    }
    return RouteRequest(**fields | changes)


class Exact(Random):
    """Takes every claim at its word and makes no offer dearer: the plan is the cheapest one."""

    def random(self) -> float:
        return 0.0


class Trusting(Random):
    """Believes every claim, and spreads as usual."""

    def random(self) -> float:
        return super().random() / 2
