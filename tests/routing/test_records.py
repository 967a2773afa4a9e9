import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.config import MAX_RECORD_BYTES
from llmasos.routing.records import DTYPES, MAX_CLOCK_SKEW_S, PeerRecord, PeerState, RecordError
from llmasos.span import Span
from tests.routing.builders import NOW, a_record

words = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
seconds = st.floats(1e-6, 60.0)


@st.composite
def records(draw: st.DrawFn) -> PeerRecord:
    model_blocks = draw(st.integers(1, 200))
    start = draw(st.integers(0, model_blocks - 1))
    kv_total_tokens = draw(st.integers(0, 2**31))
    return a_record(
        draw(words),
        name=draw(st.one_of(st.just(""), words)),
        model=draw(words),
        digest=draw(words),
        model_blocks=model_blocks,
        span=Span(start, draw(st.integers(start + 1, model_blocks))),
        state=draw(st.sampled_from(PeerState)),
        incarnation=draw(st.integers(0, 2**63 - 1)),
        announced_at=draw(st.floats(0, NOW + MAX_CLOCK_SKEW_S)),
        addresses=tuple(draw(st.lists(words, max_size=8))),
        dtype=draw(st.sampled_from(DTYPES)),
        quantization=draw(st.sampled_from(["none", "int8", "int4"])),
        block_seconds=draw(seconds),
        row_seconds=draw(seconds),
        throughput=draw(st.floats(1e-3, 1e9)),
        active_sessions=draw(st.integers(0, 1_000_000)),
        queued_tokens=draw(st.integers(0, 2**31)),
        kv_free_tokens=draw(st.integers(0, kv_total_tokens)),
        kv_total_tokens=kv_total_tokens,
    )


@given(records())
def test_a_record_survives_the_wire(record: PeerRecord) -> None:
    assert PeerRecord.from_bytes(record.to_bytes(), peer=record.peer, now=NOW) == record


@given(records())
def test_a_load_is_a_share(record: PeerRecord) -> None:
    assert 0.0 <= record.load <= 1.0


def test_a_peer_is_relayed_when_no_address_is_its_own() -> None:
    own, through = "/ip4/10.0.0.1/tcp/5/p2p/alice", "/ip4/10.0.0.9/tcp/5/p2p/relay/p2p-circuit/p2p/alice"
    assert a_record("alice", addresses=(through,)).relayed
    assert not a_record("alice", addresses=(through, own)).relayed
    assert not a_record("alice", addresses=()).relayed


def fields_of(record: PeerRecord) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(record.to_bytes())
    return fields


def parse(fields: Any, peer: str = "alice") -> PeerRecord:
    return PeerRecord.from_bytes(json.dumps(fields).encode(), peer=peer, now=NOW)


def test_fields_of_the_future_are_ignored() -> None:
    assert parse(fields_of(a_record()) | {"gpu": "H200", "rtts": {"bob": 0.1}}) == a_record()


def test_what_a_peer_may_leave_out() -> None:
    fields = fields_of(a_record())
    for name in ("name", "addresses", "quantization", "active_sessions", "queued_tokens"):
        del fields[name]
    record = parse(fields)
    assert (record.name, record.addresses, record.quantization) == ("", (), "none")
    assert record.load == pytest.approx(0.2)  # 4,000 of 5,000 tokens are free, and nothing waits


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peer", "mallory"),
        ("peer", None),
        ("name", "x" * 65),
        ("name", "\x1b[2J"),
        ("name", "evil\u202etxt"),
        ("name", "line\nbreak"),
        ("name", "half a \ud800 pair"),
        ("model", ""),
        ("digest", 7),
        ("model_blocks", 0),
        ("model_blocks", 10**9),
        ("model_blocks", True),
        ("model_blocks", 30.0),
        ("span", "0:31"),
        ("span", "5:5"),
        ("span", "5:4"),
        ("span", "all"),
        ("span", [0, 12]),
        ("state", "retired"),
        ("incarnation", -1),
        ("incarnation", 2**63),
        ("announced_at", NOW + MAX_CLOCK_SKEW_S + 0.1),
        ("announced_at", -1),
        ("announced_at", "now"),
        ("addresses", "/ip4/10.0.0.1"),
        ("addresses", [1]),
        ("addresses", [""]),
        ("addresses", ["/a"] * 17),
        ("dtype", "float64"),
        ("quantization", "INT 4"),
        ("version", ""),
        ("block_seconds", 0),
        ("block_seconds", -0.001),
        ("block_seconds", 1e-9),
        ("block_seconds", 61),
        ("block_seconds", 10**400),
        ("block_seconds", None),
        ("row_seconds", 0),
        ("row_seconds", 1e-12),
        ("throughput", 0.0),
        ("throughput", 1e10),
        ("active_sessions", -1),
        ("queued_tokens", 2**40),
        ("kv_free_tokens", 5_001),
        ("kv_free_tokens", 1.5),
        ("kv_total_tokens", -1),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RecordError) as refused:
        parse(fields_of(a_record()) | {field: value})
    assert refused.value.field == field or (field == "kv_total_tokens" and refused.value.field == "kv_free_tokens")
    assert field in str(refused.value) or refused.value.field in str(refused.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["block_seconds", "row_seconds", "throughput", "announced_at"])
def test_no_infinity_gets_in(field: str, number: str) -> None:
    fields = fields_of(a_record())
    text = json.dumps(fields).replace(json.dumps({field: fields[field]})[1:-1], f'"{field}": {number}')
    assert number in text
    with pytest.raises(RecordError):
        PeerRecord.from_bytes(text.encode(), peer="alice", now=NOW)


@pytest.mark.parametrize("field", sorted(fields_of(a_record()).keys() - {"name", "addresses", "quantization"}))
def test_what_is_missing_is_named(field: str) -> None:
    fields = fields_of(a_record())
    del fields[field]
    if field in ("active_sessions", "queued_tokens"):
        assert parse(fields) == a_record()
        return
    with pytest.raises(RecordError, match=field):
        parse(fields)


def test_a_record_of_our_own_is_held_to_the_same_bounds() -> None:
    with pytest.raises(RecordError, match="row_seconds"):
        a_record(row_seconds=float("nan"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 2_000,
        b'{"a":' * 400,
        b"1" * 2_000,
        b'{"incarnation":' + b"9" * 1_900 + b"}",
        b" " * (MAX_RECORD_BYTES + 1),
    ],
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        PeerRecord.from_bytes(data, peer="alice", now=NOW)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_record_error(data: bytes) -> None:
    with pytest.raises(RecordError):
        PeerRecord.from_bytes(data, peer="alice", now=NOW)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_hostile_fields_raise_a_record_error_or_make_a_valid_record(data: st.DataObject) -> None:
    fields = fields_of(a_record())
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)):
        fields[name] = data.draw(json_values)
    try:
        record = PeerRecord.from_bytes(json.dumps(fields).encode(), peer="alice", now=NOW)
    except RecordError:
        return
    assert PeerRecord.from_bytes(record.to_bytes(), peer="alice", now=NOW) == record


@given(st.data())
def test_damaged_bytes_raise_a_record_error_or_make_a_valid_record(data: st.DataObject) -> None:
    damaged = bytearray(a_record().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        record = PeerRecord.from_bytes(bytes(damaged), peer="alice", now=NOW)
    except RecordError:
        return
    assert record.peer == "alice"


def test_a_record_too_large_for_others_is_not_announced() -> None:
    with pytest.raises(RecordError, match="fewer addresses"):
        a_record(addresses=("/dns/" + "x" * 200,) * 16).to_bytes()


def test_a_usual_record_is_small() -> None:
    address = "/ip4/203.0.113.77/tcp/40001"
    record = a_record("12D3KooW" + "x" * 44, digest="sha256:" + "0" * 64, addresses=(address,) * 8)
    assert len(record.to_bytes()) < 900


def test_a_record_that_has_not_changed_is_not_parsed_again() -> None:
    data, peer = a_record().to_bytes(), a_record().peer
    first = PeerRecord.from_bytes(data, peer=peer, now=NOW)
    assert PeerRecord.from_bytes(bytes(bytearray(data)), peer=peer, now=first.announced_at) is first
    with pytest.raises(RecordError, match="who has signed it"):  # what depends on who asks, and when, is still checked
        PeerRecord.from_bytes(data, peer="somebody else", now=first.announced_at)
    with pytest.raises(RecordError, match="in the future"):
        PeerRecord.from_bytes(data, peer=peer, now=first.announced_at - 1_000)
