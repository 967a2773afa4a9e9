"""Every family, block by block, against transformers running the whole model."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from llmasos.blocks import fused
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, load_blocks
from llmasos.blocks.linear import PackedPart
from llmasos.blocks.llama_shape import FAMILIES as LLAMA_SHAPED
from llmasos.blocks.llama_shape import MisfitError
from llmasos.span import Span
from tests.blocks.conftest import Session, Split, steps, tokens
from tests.checkpoints import BLOCKS, FAMILIES, HIDDEN

ONE_BY_ONE = {"bloom", "falcon-alibi", "falcon-rotary", "falcon-new", "gpt_neo", "gptj", "mpt", "deepseek_v3", "biogpt"}
"""Families whose code has no place for our attention, or caches something else than keys and values, or masks anew."""


@pytest.fixture(params=FAMILIES)
def split(request: pytest.FixtureRequest, split_model: Any) -> Split:
    return split_model(request.param)  # type: ignore[no-any-return]


def close(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-5 * float(expected.abs().max()))


def through(blocks: DecoderBlocks, rows: torch.Tensor, *cuts: int) -> torch.Tensor:
    cache = blocks.new_cache()
    parts = [blocks.forward([BlockChunk(cache, blocks.span, cache.length, part)])[0] for part in rows.split(cuts)]
    return torch.cat(parts)


@torch.inference_mode()
def test_each_block_gives_the_hidden_states_of_transformers(split: Split) -> None:
    ids = tokens(23)
    wanted = split.reference(torch.tensor([ids]), output_hidden_states=True)
    hidden = [states[0] for states in wanted.hidden_states]  # entering block 0, 1, …; the last is behind the final norm
    torch.testing.assert_close(split.ends.embed(ids, 0), hidden[0], rtol=0, atol=0)
    for piece in split.pieces:
        (out,) = piece.forward([BlockChunk(piece.new_cache(), piece.span, 0, hidden[piece.span.start])])
        assert out.shape == (23, HIDDEN)
        if piece.span.end < BLOCKS:
            close(out, hidden[piece.span.end])
        else:
            close(split.ends.logits(out), wanted.logits[0].float())


@pytest.mark.parametrize(("family", "only_looks_up"), [("llama", True), ("gemma2", False), ("gpt2", False)])
@torch.inference_mode()
def test_tokens_enter_as_in_transformers_wherever_they_stand(
    family: str, only_looks_up: bool, split_model: Any
) -> None:
    split, ids = split_model(family), tokens(9)
    assert (split.ends._table is not None) is only_looks_up
    entering = split.reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[0][0]
    for cut in (1, 4, 8):
        assert torch.equal(split.ends.embed(ids[cut:], cut), entering[cut:])


@torch.inference_mode()
def test_a_session_may_enter_a_span_in_its_middle(split: Split) -> None:
    wanted = split.reference(torch.tensor([tokens(14)]), output_hidden_states=True)
    hidden = [states[0] for states in wanted.hidden_states]
    blocks = split.load(Span(1, 5))
    inside, front = Span(2, 4), Span(1, 3)
    cache, other = blocks.new_cache(), blocks.new_cache()
    first = blocks.forward([BlockChunk(cache, inside, 0, hidden[2][:9]), BlockChunk(other, front, 0, hidden[1][:9])])
    second = blocks.forward([BlockChunk(other, front, 9, hidden[1][9:]), BlockChunk(cache, inside, 9, hidden[2][9:])])
    close(torch.cat([first[0], second[1]]), hidden[4])
    close(torch.cat([first[1], second[0]]), hidden[3])


def test_generation_gives_the_tokens_of_transformers(split: Split) -> None:
    """With the prompt in chunks, and another session beside it that starts later and ends earlier."""
    prompt, asked = tokens(25), 12
    wanted = split.reference.generate(torch.tensor([prompt]), max_new_tokens=asked, do_sample=False, eos_token_id=None)
    session, other = Session(split), Session(split)
    session.step(prompt[:11])
    logits, _ = steps([session, other], [prompt[11:], tokens(5, seed=2)])
    given: list[int] = []
    for index in range(asked):
        given.append(int(logits[-1].argmax()))
        if index < 8:
            _, logits = steps([other, session], [tokens(1, seed=index), given[-1:]])
        else:
            logits = session.step(given[-1:])
    assert given == wanted[0, len(prompt) :].tolist()


def test_cutting_back_and_going_on_equals_never_having_been_there(split: Split) -> None:
    ids = tokens(21)
    straight, cut = Session(split), Session(split)
    straight.step(ids[:16])
    expected = straight.step(ids[16:])
    cut.step(ids[:16])
    cut.step(tokens(4, seed=3))
    cut.cut(16)
    torch.testing.assert_close(cut.step(ids[16:]), expected, rtol=0, atol=0)
    cut.cut(0)
    assert all(cache.nbytes == 0 for cache in cut.caches)
    close(cut.step(ids)[16:], expected)


def test_llama_shaped_families_run_in_blocks_of_our_own(split: Split) -> None:
    for piece in split.pieces:
        assert (piece.fused is not None) == (split.reference.config.model_type in LLAMA_SHAPED)


def test_a_block_of_our_own_that_computes_something_else_is_not_taken(
    split_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_model("llama")
    monkeypatch.setattr(fused, "_rotated", lambda heads, cosines, sines: heads)
    piece = load_blocks(split.spec, Span(1, 4), engine="torch")
    assert piece.packed
    assert piece.fused is None
    rows = torch.randn(9, HIDDEN)
    (given,) = piece.forward([BlockChunk(piece.new_cache(), piece.span, 0, rows)])
    close(given, piece.run_as_family(rows, DynamicCache()))
    assert not any(isinstance(module, PackedPart) for module in piece._chain.modules())


def test_all_blocks_are_our_own_or_none(split_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    split, of = split_model("llama"), fused.shape_of
    layers = iter(range(10))

    def shape_of(layer: nn.Module, family: str) -> Any:
        if next(layers) == 2:
            raise MisfitError("the third of them is another")
        return of(layer, family)

    monkeypatch.setattr(fused, "shape_of", shape_of)
    piece = load_blocks(split.spec, Span(0, 5), engine="torch")
    assert next(layers) == 3  # nobody looked at the others
    assert piece.packed
    assert piece.fused is None
    assert not any(isinstance(module, PackedPart | nn.Linear) for module in piece._chain.modules())


def test_a_session_outgrows_the_first_angles(split_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    split, rows = split_model("gemma3_text"), torch.randn(90, HIDDEN)  # two kinds of angles
    whole = load_blocks(split.spec, Span(1, 5), engine="torch")
    expected = through(whole, rows, 4, 4, 82)
    monkeypatch.setattr("llmasos.blocks.angles._FIRST_POSITIONS", 7)
    piece = load_blocks(split.spec, Span(1, 5), engine="torch")
    assert piece.fused is not None
    torch.testing.assert_close(through(piece, rows, 4, 4, 82), expected, rtol=0, atol=0)


def test_which_families_share_a_forward_pass(split: Split) -> None:
    assert all(piece.packed is (split.family not in ONE_BY_ONE) for piece in split.pieces)
