"""Messages <-> bytes: what is sent arrives, and what a stranger sends is a message or a FrameError."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmasos.codec import CODECS
from llmasos.config import INT8_BLOCK, MAX_FRAME_BYTES, MAX_HIDDEN, MAX_STEP_TOKENS
from llmasos.wire import (
    ITEM_BYTES,
    MAX_MESSAGE_CHARS,
    VERSION,
    AnyMessage,
    Attach,
    Close,
    Contact,
    Draining,
    ErrorCode,
    Failed,
    FrameError,
    NextHop,
    Open,
    Opened,
    Ping,
    Pong,
    Replay,
    Reroute,
    Result,
    Step,
    Tensor,
    decode,
    encode,
    join_rows,
    row_bytes,
)


def rows(tokens: int, hidden: int = 3, dtype: str = "float32", first: int = 0, codec: str = "exact") -> Tensor:
    """A tensor of which every byte is known; no two rows of it are alike."""
    size = tokens * row_bytes(hidden, dtype, codec)
    return Tensor(dtype, (tokens, hidden), memoryview(bytes((first + n) % 251 for n in range(size))), codec)


def same(left: object, right: object) -> bool:
    """Equality that looks into tensors: two memoryviews of the same bytes may be of different formats."""
    return msgspec.msgpack.encode(left) == msgspec.msgpack.encode(right) and type(left) is type(right)


# --- every message that there is ------------------------------------------------------------------------------------

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128)
counts = st.integers(0, 2**31)
indexes = st.integers(0, 2**20)
addresses = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=256), max_size=16).map(tuple)
contacts = st.builds(Contact, peer=ids, addresses=addresses)
next_hops = st.none() | st.builds(NextHop, contact=contacts, session=ids)
trails = st.just(msgspec.UNSET) | st.lists(st.tuples(counts, counts), max_size=5).map(tuple)
sides = {"upstream": st.none() | ids, "downstream": next_hops, "relay": st.booleans()}
tensors = st.builds(
    rows,
    st.integers(0, 7),
    st.integers(1, 5),
    st.sampled_from(sorted(ITEM_BYTES)),
    st.integers(0, 250),
    st.sampled_from(CODECS),
)
by_type: dict[type, st.SearchStrategy[AnyMessage]] = {
    Open: st.builds(
        Open,
        session=ids,
        digest=ids,
        dtype=st.sampled_from(sorted(ITEM_BYTES)),
        start=indexes,
        end=indexes,
        tokens=counts,
        trace=st.booleans(),
        codec=st.sampled_from(CODECS),
        **sides,
    ),
    Opened: st.builds(Opened, kv_free_tokens=counts, codecs=st.lists(ids, max_size=16).map(tuple)),
    Attach: st.builds(Attach, session=ids),
    Step: st.builds(Step, step=counts, position=counts, keep=counts, hidden=tensors, replay=counts, spent=trails),
    Result: st.builds(Result, step=counts, hidden=tensors, spent=trails),
    Reroute: st.builds(Reroute, **sides),
    Replay: st.builds(Replay, step=counts, until=counts, chunk=st.integers(1, MAX_STEP_TOKENS), hops=counts),
    Failed: st.builds(
        Failed,
        code=st.sampled_from(ErrorCode.__args__),
        message=st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_MESSAGE_CHARS),
        step=st.none() | counts,
        peer=st.none() | ids,
        retry_after_s=st.floats(0, 86_400),
    ),
    Ping: st.builds(Ping, nonce=counts, padding=st.binary(max_size=300)),
    Pong: st.builds(
        Pong,
        nonce=counts,
        padding=st.binary(max_size=300),
        accepted=st.none() | counts,
        passed=st.none() | counts,
        queued=counts,
        sessions=st.none() | counts,
        kv_free_tokens=st.none() | counts,
    ),
    Draining: st.just(Draining()),
    Close: st.just(Close()),
}
messages = st.one_of(by_type.values())


def test_plain_rows_are_sent_as_they_were_before_there_were_codecs() -> None:
    assert b"codec" not in encode(Result(step=3, hidden=rows(1)))


@pytest.mark.parametrize(("codec", "hidden", "expected"), [("bfloat16", 65, 130), ("int8", 64, 68), ("int8", 65, 73)])
def test_what_packed_rows_weigh(codec: str, hidden: int, expected: int) -> None:
    assert INT8_BLOCK == 64
    assert row_bytes(hidden, "float32", codec) == rows(1, hidden, codec=codec).data.nbytes == expected


@given(messages)
def test_what_is_sent_arrives(message: AnyMessage) -> None:
    assert same(decode(encode(message)), message)


def test_times_do_not_travel_unless_they_were_asked_for() -> None:
    plain = encode(Result(step=3, hidden=rows(1)))
    assert b"spent" not in plain
    assert len(encode(Result(step=3, hidden=rows(1), spent=((5, 900), (7, 1_100))))) - len(plain) < 20


def test_no_message_is_left_out_here() -> None:
    assert set(by_type) == set(AnyMessage.__args__)


# --- what a stranger may send ---------------------------------------------------------------------------------------


def decodes_or_refuses(frame: bytes) -> None:
    """The whole promise of `decode`."""
    try:
        message = decode(frame)
    except FrameError:
        return
    assert isinstance(message, AnyMessage)


@given(st.binary(max_size=400))
@example(b"")
@example(b"\x01")
@example(b"\x01\x81\xa4type\xa5close" + b"\x00")  # a message, and something behind it
def test_garbage_is_refused_and_nothing_else(frame: bytes) -> None:
    decodes_or_refuses(frame)


@given(messages, st.data())
def test_a_damaged_frame_is_a_message_or_refused(message: AnyMessage, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_refuses(bytes(frame))


@given(messages, st.data())
def test_a_frame_that_was_cut_is_refused(message: AnyMessage, data: st.DataObject) -> None:
    frame = encode(message)
    with pytest.raises(FrameError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(
    ["session", "digest", "dtype", "start", "step", "position", "keep", "hidden", "downstream", "code", "message"]
)


@given(
    st.sampled_from(["open", "attach", "step", "reroute", "replay", "failed", "ping", "pong", "close", "bogus"]),
    st.dictionaries(fields, json_like, max_size=6),
)
def test_well_formed_nonsense_is_refused(kind: str, content: dict[str, object]) -> None:
    try:
        body = msgspec.msgpack.encode({"type": kind, **content})
    except (UnicodeEncodeError, OverflowError):
        return
    decodes_or_refuses(bytes([VERSION]) + body)


def frame_of(content: object) -> bytes:
    return bytes([VERSION]) + msgspec.msgpack.encode(content)


def step_with(**tensor: object) -> bytes:
    hidden = {"dtype": "float32", "shape": [1, 3], "data": bytes(12)} | tensor
    return frame_of({"type": "step", "step": 0, "position": 0, "keep": 1, "hidden": hidden})


def test_a_tensor_is_taken() -> None:
    message = decode(step_with())
    assert isinstance(message, Step)
    assert (message.hidden.tokens, message.hidden.hidden) == (1, 3)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"\x02" + encode(Close())[1:], "version 1"),
        (frame_of({"type": "shutdown"}), "shutdown"),
        (frame_of({"session": "s"}), "type"),
        (frame_of(["close"]), "object"),
        (frame_of({"type": "attach"}), "session"),
        (frame_of({"type": "attach", "session": ""}), "length"),
        (frame_of({"type": "attach", "session": "s" * 129}), "length"),
        (frame_of({"type": "opened", "kv_free_tokens": -1}), "kv_free_tokens"),
        (frame_of({"type": "opened", "kv_free_tokens": 2**40}), "kv_free_tokens"),
        (frame_of({"type": "opened", "kv_free_tokens": True}), "bool"),
        (frame_of({"type": "failed", "code": "refused", "message": "", "retry_after_s": float("nan")}), "retry_after"),
        (frame_of({"type": "replay", "step": 0, "until": 5, "chunk": 0, "hops": 1}), "chunk"),
        (step_with(data=bytes(11)), "12 bytes, not 11"),
        (step_with(data="text"), "data"),
        (step_with(dtype="float64"), "float64"),
        (step_with(codec="int4"), "int4"),
        (step_with(codec="int8"), "7 bytes, not 12"),
        (step_with(shape=[1, 0], data=b""), "shape"),
        (step_with(shape=[-1, 3]), "shape"),
        (step_with(shape=[3]), "shape"),
        (step_with(shape=[MAX_STEP_TOKENS + 1, 3]), "shape"),
        (step_with(shape=[1, MAX_HIDDEN + 1]), "shape"),
    ],
)
def test_refusals_say_why(frame: bytes, why: str) -> None:
    with pytest.raises(FrameError, match=why):
        decode(frame)


def test_a_frame_cannot_make_us_allocate_what_it_does_not_carry() -> None:
    def text(value: str) -> bytes:
        return bytes([0xA0 + len(value)]) + value.encode()

    huge = b"\xdd\xff\xff\xff\xff"  # "an array of four billion elements follows"
    contact = b"\x82" + text("peer") + text("p") + text("addresses") + huge
    reroute = b"\x82" + text("type") + text("reroute") + text("downstream") + b"\x81" + text("contact") + contact
    with pytest.raises(FrameError, match="length <= 16"):
        decode(bytes([VERSION]) + reroute)
    with pytest.raises(FrameError, match="truncated"):
        decode(bytes([VERSION]) + b"\x82" + text("type") + text("close") + text("more") + huge)


def test_a_tower_of_brackets_is_refused() -> None:
    tower = b"\x82\xa4type\xa5close\xa4more" + b"\x91" * 200_000 + b"\x90"
    with pytest.raises(FrameError, match="recursion"):
        decode(bytes([VERSION]) + tower)


def test_unknown_fields_are_ignored() -> None:
    """A newer peer may say more than we understand."""
    assert decode(frame_of({"type": "ping", "nonce": 4, "mood": ["good"]})) == Ping(nonce=4)


def test_a_frame_over_the_limit_is_not_sent() -> None:
    with pytest.raises(FrameError, match="over the limit"):
        encode(Ping(padding=bytes(MAX_FRAME_BYTES)))
    assert len(encode(Ping(padding=bytes(MAX_FRAME_BYTES - 64)))) <= MAX_FRAME_BYTES


def test_the_largest_step_of_a_prompt_fits() -> None:
    """1,024 rows of the widest models in use."""
    hidden = Tensor("float32", (1_000, 16_384), memoryview(bytes(1_000 * 16_384 * 4)))
    assert len(encode(Step(step=0, position=0, keep=0, hidden=hidden))) <= MAX_FRAME_BYTES


# --- tensors --------------------------------------------------------------------------------------------------------


def test_a_decoded_tensor_views_its_frame() -> None:
    frame = encode(Result(step=0, hidden=rows(5)))
    message = decode(frame)
    assert isinstance(message, Result)
    assert message.hidden.data.obj is frame


@given(st.integers(0, 9), st.data())
def test_rows_are_a_view_of_the_right_bytes(tokens: int, data: st.DataObject) -> None:
    codec, row = data.draw(st.sampled_from([("exact", 6), ("int8", 7)]))
    whole = rows(tokens, hidden=3, dtype="bfloat16", codec=codec)
    start = data.draw(st.integers(0, tokens))
    end = data.draw(st.integers(start, tokens))
    part = whole.rows(start, end)
    assert (part.tokens, part.hidden, part.dtype, part.codec) == (end - start, 3, "bfloat16", codec)
    assert bytes(part.data) == bytes(whole.data)[start * row : end * row]


@given(st.integers(1, 12), st.data())
def test_joining_undoes_cutting(tokens: int, data: st.DataObject) -> None:
    whole = rows(tokens, codec=data.draw(st.sampled_from(CODECS)))
    cuts = sorted({0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=4))})
    parts = [whole.rows(start, end) for start, end in pairwise(cuts)]
    assert same(join_rows(parts), whole)


def test_a_single_part_is_not_copied() -> None:
    part = rows(4)
    assert join_rows([part]) is part


@pytest.mark.parametrize(("shape", "nbytes"), [((2, 3), 23), ((2, 3), 25), ((0, 3), 1)])
def test_a_tensor_whose_bytes_do_not_fit_cannot_be_made(shape: tuple[int, int], nbytes: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Tensor("float32", shape, memoryview(bytes(nbytes)))
