import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.config import LEASE_S, MAX_LEASE_S
from llmasos.routing import view as view_module
from llmasos.routing.records import PeerRecord, PeerState
from llmasos.routing.view import Checkpoint, SwarmView, status
from llmasos.span import Span
from tests.routing.builders import NOW, a_record, a_view

DIGEST = "sha256:00ff"


@st.composite
def small_records(draw: st.DrawFn) -> PeerRecord:
    start = draw(st.integers(0, 6))
    return a_record(
        draw(st.sampled_from(["alice", "bob", "carol", "dave"])),
        model=draw(st.sampled_from(["smollm2", "llama"])),
        digest=draw(st.sampled_from([DIGEST, "sha256:ee"])),
        model_blocks=7,
        span=Span(start, draw(st.integers(start + 1, 7))),
        state=draw(st.sampled_from(PeerState)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        incarnation=draw(st.integers(1, 3)),
        announced_at=NOW - draw(st.integers(0, 19)),
    )


def contents(view: SwarmView) -> dict[str, Any]:
    """Everything that can be asked of a view, pools included."""
    offers = {
        (model, checkpoint, numerics, start): ranked
        for model in view.models()
        for checkpoint in {Checkpoint(record.digest, record.model_blocks) for record in view.peers(model)}
        for numerics, pool in view.pools(model, checkpoint).items()
        for start, ranked in pool.starts.items()
    }
    return {"status": status(view, NOW), "offers": offers, "size": len(view)}


@given(st.lists(small_records(), max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(records: list[PeerRecord], rng: random.Random) -> None:
    unique = list({(r.peer, r.model, r.recency): r for r in records}.values())
    shuffled = rng.sample(unique, len(unique))
    assert contents(a_view(*unique)) == contents(a_view(*shuffled))


@given(st.lists(st.tuples(small_records(), st.sampled_from(["add", "remove", "expire"])), max_size=25))
def test_what_is_kept_beside_the_records_follows_them(events: list[tuple[PeerRecord, str]]) -> None:
    view, now = SwarmView(), NOW
    for record, event in events:
        if event == "add":
            view.add(record)
        elif event == "remove":
            view.remove(record.peer, record.model)
        else:
            now += 2.0
            view.expire(now)
    fresh = SwarmView()
    for model in view.models():
        for record, expires_at in view.leases(model).values():
            fresh.add(record, expires_at)
    assert contents(view) == contents(fresh)


@given(st.lists(small_records(), max_size=12))
def test_coverage_counts_the_online_peers_of_each_block(records: list[PeerRecord]) -> None:
    view = a_view(*records)
    for model in view.models():
        checkpoint = view.checkpoint(model)
        assert checkpoint is not None
        online = [
            record
            for record in view.peers(model)
            if record.state is PeerState.ONLINE and record.digest == checkpoint.digest
        ]
        counts = [sum(block in record.span for record in online) for block in range(7)]
        assert view.coverage(model) == counts
        assert [len(view.serving(model, block)) for block in range(7)] == counts
        held = [
            {block for record in online if record.dtype == dtype for block in record.span.blocks()}
            for dtype in ("float32", "bfloat16")
        ]
        missing = {block for span in view.missing(model) for block in span.blocks()}
        assert missing in [set(range(7)) - blocks for blocks in held]
        assert len(missing) == 7 - max(map(len, held))


def test_peers_of_other_numbers_do_not_complete_each_other() -> None:
    view = a_view(a_record("alice", "0:20"), a_record("bob", "20:30", dtype="bfloat16"))
    assert view.missing("smollm2") == [Span(20, 30)]
    (model,) = status(view, NOW)["models"]
    assert not model["covered"]
    view.add(a_record("carol", "0:20", dtype="bfloat16"))
    assert view.missing("smollm2") == []


@pytest.mark.parametrize("state", [PeerState.JOINING, PeerState.DRAINING, PeerState.OFFLINE])
def test_only_online_peers_cover_but_all_are_shown(state: PeerState) -> None:
    view = a_view(a_record("alice", "0:30"), a_record("bob", "0:30", state=state))
    assert view.coverage("smollm2") == [1] * 30
    assert [record.peer for record in view.peers("smollm2")] == ["alice", "bob"]
    view.remove("alice")
    assert view.missing("smollm2") == [Span(0, 30)]


def test_a_restarted_peer_outranks_its_former_self_whatever_its_clock_says() -> None:
    view = a_view(a_record(blocks="3:9", incarnation=8, announced_at=NOW - 9))
    assert not view.add(a_record(blocks="0:12", incarnation=7, announced_at=NOW))
    assert [record.span for record in view.peers("smollm2")] == [Span(3, 9)]


def test_a_silent_peer_is_gone_when_its_lease_ends() -> None:
    view = a_view(a_record("alice", announced_at=NOW - 3), a_record("bob", announced_at=NOW))
    assert view.expire(NOW - 3 + LEASE_S - 0.1) == []
    assert [record.peer for record in view.expire(NOW - 3 + LEASE_S)] == ["alice"]
    assert len(view) == 1
    view.expire(NOW + LEASE_S)
    assert (len(view), view.models(), view.coverage("smollm2"), view.missing("smollm2")) == (0, [], [], [])


def test_the_registry_knows_the_lease_better_but_no_ghost_stays() -> None:
    view = SwarmView()
    view.add(a_record("alice", announced_at=NOW), NOW + 60)
    view.add(a_record("ghost", announced_at=NOW), NOW + 1e9)
    view.expire(NOW + 59)
    assert len(view) == 2
    view.expire(NOW + MAX_LEASE_S)
    assert len(view) == 0


def test_a_renewed_record_lives_on() -> None:
    view = a_view(a_record(announced_at=NOW), a_record(announced_at=NOW + 6))
    assert view.expire(NOW + LEASE_S) == []
    assert len(view) == 1


def test_one_liar_does_not_decide_what_the_model_is() -> None:
    honest = [a_record("alice", "0:15"), a_record("bob", "15:30")]
    liars = [a_record("mallory", "0:99", digest="sha256:bad", model_blocks=99), a_record("eve", "0:2", model_blocks=2)]
    view = a_view(*liars, *honest)
    assert view.checkpoint("smollm2") == Checkpoint(DIGEST, 30)
    assert view.coverage("smollm2") == [1] * 30
    assert view.missing("smollm2") == []
    assert view.missing("smollm2", "sha256:bad") == []
    assert view.missing("smollm2", "sha256:unheard-of") == []
    assert [peer["peer"] for peer in status(view, NOW)["models"][0]["peers"]] == ["eve", "alice", "mallory", "bob"]


def test_models_are_told_apart() -> None:
    view = a_view(a_record("alice", "0:30"), a_record("alice", "0:3", model="llama", model_blocks=5))
    assert view.models() == ["llama", "smollm2"]
    assert view.missing("llama") == [Span(3, 5)]
    view.remove("alice", "llama")
    assert view.models() == ["smollm2"]
    assert view.record("alice", "smollm2") == a_record("alice", "0:30")
    assert view.record("alice", "llama") is None


def test_a_flood_of_strangers_is_bounded_and_the_known_are_still_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MAX_RECORDS", 2)
    view = a_view(a_record("alice"), a_record("bob"))
    assert not view.add(a_record("mallory"))
    assert view.add(a_record("alice", announced_at=NOW))
    assert len(view) == 2


def test_status_has_exactly_the_promised_shape() -> None:
    view = a_view(
        a_record("alice", "0:4", name="A", kv_free_tokens=2_500),
        a_record("bob", "7:30", state=PeerState.DRAINING, dtype="bfloat16", quantization="int8"),
        a_record("carol", "7:29"),
    )
    assert status(view, NOW) == {
        "models": [
            {
                "model": "smollm2",
                "blocks": 30,
                "covered": False,
                "missing": ["4:7", "29:30"],
                "peers": [
                    {
                        "peer": "alice",
                        "name": "A",
                        "blocks": "0:4",
                        "state": "online",
                        "throughput": 110.0,
                        "load": 0.5,
                        "kv_free_tokens": 2_500,
                        "dtype": "float32",
                        "quantization": "none",
                        "version": "0.1.0",
                        "age_s": 3.0,
                    },
                    {**SHOWN, "peer": "carol", "name": "carol's machine", "blocks": "7:29", "state": "online"},
                    {
                        **SHOWN,
                        "peer": "bob",
                        "name": "bob's machine",
                        "blocks": "7:30",
                        "state": "draining",
                        "dtype": "bfloat16",
                        "quantization": "int8",
                    },
                ],
            }
        ]
    }


SHOWN = {
    "throughput": 110.0,
    "load": pytest.approx(0.2),
    "kv_free_tokens": 4_000,
    "dtype": "float32",
    "quantization": "none",
    "version": "0.1.0",
    "age_s": 3.0,
}


def test_status_leaves_out_who_said_goodbye() -> None:
    view = SwarmView()
    view.add(a_record("stays", model_blocks=7, span=Span(0, 4)))
    view.add(a_record("leaves", model_blocks=7, span=Span(4, 7), state=PeerState.OFFLINE))
    (model,) = status(view, now=NOW)["models"]
    assert [peer["peer"] for peer in model["peers"]] == ["stays"]
    view.add(a_record("stays", model_blocks=7, span=Span(0, 4), state=PeerState.OFFLINE, announced_at=NOW + 1))
    assert status(view, now=NOW + 1) == {"models": []}
