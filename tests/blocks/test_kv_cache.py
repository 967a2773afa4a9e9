"""The kv of a session: what it holds, what it costs, and what is left of it after a cut or a failure."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmasos.blocks import kv_cache
from llmasos.blocks.kv_cache import BlockKV, SessionCache
from llmasos.blocks.layers import BlockChunk
from llmasos.errors import UsageError
from llmasos.span import Span
from tests.checkpoints import HIDDEN

HEADS, KEY, VALUE = 3, 5, 7


@given(st.lists(st.tuples(st.integers(1, 90), st.floats(0, 1)), max_size=8))
def test_a_block_returns_everything_written_so_far(writes: list[tuple[int, float]]) -> None:
    kv, expected = BlockKV(), torch.empty(HEADS, 0, KEY)
    for count, kept in writes:
        expected = expected[:, : int(kept * expected.shape[1])]  # a cut before the write
        fresh = torch.randn(HEADS, count, KEY)
        keys, values = kv.write(expected.shape[1], fresh, torch.zeros(HEADS, count, VALUE))
        expected = torch.cat([expected, fresh], dim=1)
        assert torch.equal(keys, expected)
        assert values.shape == (HEADS, expected.shape[1], VALUE)
        assert kv.keys is not None
        capacity = kv.keys.shape[1]
        assert capacity % 64 == 0
        assert kv.nbytes == 4 * HEADS * capacity * (KEY + VALUE)


def test_capacity_doubles() -> None:
    kv, capacities = BlockKV(), []
    for position in range(0, 300, 10):
        kv.write(position, torch.zeros(HEADS, 10, KEY), torch.zeros(HEADS, 10, VALUE))
        assert kv.keys is not None
        capacities.append(kv.keys.shape[1])
    assert sorted(set(capacities)) == [64, 128, 256, 512]


def test_cutting_never_adds_tokens() -> None:
    cache = SessionCache(Span(0, 2))
    for length in (-1, 1):
        with pytest.raises(UsageError, match="cannot cut 0 cached tokens"):
            cache.truncate(length)


def test_accounts_are_exact(split_model: Any) -> None:
    blocks = split_model("llama").pieces[0]
    cache = blocks.new_cache()
    assert (cache.length, cache.nbytes) == (0, 0)
    blocks.forward([BlockChunk(cache, blocks.span, 0, torch.zeros(11, HIDDEN))])
    assert cache.length == 11
    assert blocks.kv_bytes_per_token == 2 * 2 * 2 * 10 * 4  # blocks, keys and values, heads, head_dim, float32
    assert cache.nbytes == 64 * blocks.kv_bytes_per_token
    blocks.forward([BlockChunk(cache, blocks.span, 11, torch.zeros(54, HIDDEN))])
    assert cache.nbytes == 128 * blocks.kv_bytes_per_token
    cache.truncate(5)
    assert cache.nbytes == 128 * blocks.kv_bytes_per_token
    cache.truncate(0)
    assert (cache.length, cache.nbytes) == (0, 0)


def test_chunks_that_do_not_fit_are_refused_and_change_nothing(split_model: Any) -> None:
    blocks = split_model("llama").pieces[0]
    cache, good = blocks.new_cache(), blocks.new_cache()
    rows = torch.zeros(3, HIDDEN)
    fine = BlockChunk(good, blocks.span, 0, rows)
    for chunk, reason in [
        (BlockChunk(cache, blocks.span, 2, rows), "position 2 meets a cache of 0"),
        (BlockChunk(cache, Span(1, 3), 0, rows), "blocks 1:3 are not among the loaded blocks 0:2"),
        (BlockChunk(cache, blocks.span, 0, torch.zeros(3, HIDDEN + 1)), "not \\(tokens, 48\\)"),
        (fine, "two chunks"),
    ]:
        with pytest.raises(UsageError, match=reason):
            blocks.forward([fine, chunk])
    assert good.length == cache.length == 0
    blocks.forward([fine])
    with pytest.raises(UsageError, match="a session on blocks 0:2 asks for blocks 0:1"):
        blocks.forward([BlockChunk(good, Span(0, 1), 3, rows)])


def test_zero_tokens_are_legal(split_model: Any) -> None:
    blocks = split_model("llama").pieces[0]
    cache, other = blocks.new_cache(), blocks.new_cache()
    nothing, something = torch.empty(0, HIDDEN), torch.ones(2, HIDDEN)
    empty, full = blocks.forward(
        [BlockChunk(cache, blocks.span, 0, nothing), BlockChunk(other, blocks.span, 0, something)]
    )
    assert (empty.shape, full.shape) == ((0, HIDDEN), (2, HIDDEN))
    assert (cache.length, cache.nbytes, other.length) == (0, 0, 2)
    assert blocks.forward([]) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # in blocks of our own, and in transformers'
def test_a_failed_forward_pass_leaves_no_trace(family: str, split_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = split_model(family).pieces[0]
    cache, clean = blocks.new_cache(), blocks.new_cache()
    rows, more = torch.randn(4, HIDDEN), torch.randn(3, HIDDEN)
    for each in (cache, clean):
        blocks.forward([BlockChunk(each, blocks.span, 0, rows)])

    buffers = iter(range(10))

    def with_room(buffer: torch.Tensor, *given: object) -> torch.Tensor:
        if next(buffers) == 2:  # the keys of the second block
            raise RuntimeError("out of memory")
        return buffer

    with monkeypatch.context() as full:
        full.setattr(kv_cache, "_with_room", with_room)
        with pytest.raises(RuntimeError, match="out of memory"):
            blocks.forward([BlockChunk(cache, blocks.span, 4, torch.randn(9, HIDDEN))])
    assert cache.length == 4
    (given,) = blocks.forward([BlockChunk(cache, blocks.span, 4, more)])
    (expected,) = blocks.forward([BlockChunk(clean, blocks.span, 4, more)])
    assert torch.equal(given, expected)
