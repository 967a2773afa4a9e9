"""Families that the compiled kernels take over, against transformers; and what they leave to torch, and say why."""

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmasos.blocks.ends import load_ends
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, load_blocks
from llmasos.blocks.llama_shape import FAMILIES, MisfitError, shape_of, window_of
from llmasos.blocks.native import loading
from llmasos.blocks.native.blocks import NativeBlocks
from llmasos.blocks.native.library import LIBRARY_VARIABLE, VARIANT_VARIABLE
from llmasos.blocks.native.stack import UNLIMITED
from llmasos.blocks.registry import resolve
from llmasos.errors import UnsupportedModelError, UsageError
from llmasos.span import Span
from tests.blocks.conftest import Session, Split, steps, tokens
from tests.checkpoints import HIDDEN, make_checkpoint, make_model

SPANS = (Span(0, 2), Span(2, 3), Span(3, 5))
CHECKPOINTS = {
    "llama",
    "llama-tied",
    "llama-dynamic",
    "llama3-rope",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma",
    "gemma2",
    "gemma3_text",
}
ERRORS = {"bfloat16": 0.02, "int8": 0.04, "int4": 0.5}
"""Relative error of the rows behind four blocks with weights of noise, which rounds worse than what was learnt."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def split_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`split_of(checkpoint)`: made once and kept."""

    @cache
    def make(name: str) -> Split:
        folder = make_checkpoint(tmp_path_factory.mktemp("model") / name, name)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        spec = resolve(str(folder))
        pieces = [load_blocks(spec, span, engine="native") for span in SPANS]
        return Split(name, folder, reference, spec, load_ends(spec), pieces)

    return make


@pytest.fixture(params=sorted(CHECKPOINTS))
def split(request: pytest.FixtureRequest, split_of: Any) -> Split:
    return split_of(request.param)  # type: ignore[no-any-return]


def error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given.float() - expected.float()).norm() / expected.float().norm())


def run(blocks: DecoderBlocks, rows: torch.Tensor, *cuts: int) -> torch.Tensor:
    kv, parts = blocks.new_cache(), []
    for part in rows.split(list(cuts) or [len(rows)]):
        parts.append(blocks.forward([BlockChunk(kv, blocks.span, kv.length, part)])[0])
    return torch.cat(parts)


def test_every_family_has_a_checkpoint_here(split_of: Any) -> None:
    assert {resolve(str(split_of(name).folder)).family for name in CHECKPOINTS} == FAMILIES


@torch.inference_mode()
def test_each_block_gives_the_hidden_states_of_transformers(split: Split) -> None:
    ids = tokens(100)
    wanted = split.reference(torch.tensor([ids]), output_hidden_states=True)
    hidden = [states[0] for states in wanted.hidden_states]
    for piece in split.pieces:
        assert isinstance(piece, NativeBlocks)
        out = run(piece, hidden[piece.span.start], 61, 1, 4, 34)
        expected = wanted.logits[0] if piece.span.end == 5 else hidden[piece.span.end]
        assert error(split.ends.logits(out) if piece.span.end == 5 else out, expected) < 2e-5


def test_generation_gives_the_tokens_of_transformers(split: Split) -> None:
    """With the prompt in chunks, a session beside it, and a cut back in the middle."""
    prompt, asked = tokens(66), 12
    wanted = split.reference.generate(torch.tensor([prompt]), max_new_tokens=asked, do_sample=False, eos_token_id=None)
    session, other = Session(split), Session(split)
    session.step(prompt[:11])
    session.step(tokens(9, seed=4))
    session.cut(11)
    logits, _ = steps([session, other], [prompt[11:], tokens(5, seed=2)])
    given: list[int] = []
    for index in range(asked):
        given.append(int(logits[-1].argmax()))
        _, logits = steps([other, session], [tokens(1, seed=index), given[-1:]])
    assert given == wanted[0, len(prompt) :].tolist()


def test_a_session_may_enter_a_span_in_its_middle(split: Split) -> None:
    blocks, rows = split.load_as("native", Span(1, 5)), torch.randn(9, HIDDEN)
    whole = run(blocks, rows)
    inside, kv, other = Span(1, 3), blocks.new_cache(), blocks.new_cache()
    (front,) = blocks.forward([BlockChunk(kv, inside, 0, rows)])
    (back,) = blocks.forward([BlockChunk(other, Span(3, 5), 0, front)])
    assert torch.equal(back, whole)
    assert kv.bytes_per_token == other.bytes_per_token == blocks.kv_bytes_per_token // 2
    assert kv.nbytes == 64 * kv.bytes_per_token
    kv.truncate(0)
    assert (kv.nbytes, kv.length, kv.span) == (0, 0, None)


@pytest.mark.parametrize("variant", ["avx512", "avx2", "portable"])
def test_variants_are_forced_by_the_environment(variant: str, split_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIANT_VARIABLE, variant)
    split, rows = split_of("gemma2"), torch.randn(70, HIDDEN)
    try:
        blocks = load_blocks(split.spec, Span(1, 5), engine="native")
    except UnsupportedModelError as refusal:
        pytest.skip(str(refusal))
    assert variant in blocks.runs_on
    assert error(run(blocks, rows), run(split.load_as("torch", Span(1, 5)), rows)) < 2e-5


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_rounded_weights_stay_close(name: str, kind: str, split_of: Any) -> None:
    split, rows = split_of(name), torch.randn(33, HIDDEN)
    options = {"dtype": kind} if kind == "bfloat16" else {"quantize": kind}
    blocks = load_blocks(split.spec, Span(1, 5), **options)
    out = run(blocks, rows.to(blocks.torch_dtype))
    assert out.dtype == blocks.torch_dtype
    assert blocks.quantization == ("none" if kind == "bfloat16" else kind)
    exact = split.load_as("native", Span(1, 5))
    assert blocks.weight_bytes < 0.6 * exact.weight_bytes
    assert 1e-4 < error(out, run(exact, rows)) < ERRORS[kind]


def test_a_session_outgrows_the_first_angles(split_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    split, rows = split_of("gemma3_text"), torch.randn(90, HIDDEN)  # two kinds of angles
    expected = run(split.load_as("native", Span(1, 5)), rows)
    monkeypatch.setattr("llmasos.blocks.angles._FIRST_POSITIONS", 7)
    blocks = load_blocks(split.spec, Span(1, 5), engine="native")
    assert torch.equal(run(blocks, rows, 2, 6, 1, 81), expected)


def test_weights_are_held_once(split_of: Any) -> None:
    blocks = split_of("llama").load_as("native", Span(1, 5))
    assert all(parameter.is_meta for parameter in blocks._owner.parameters())


# --- what is left to torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("granite", "granite blocks have not been written for them"),
        ("gpt2", "gpt2 blocks have not been written for them"),
        ("bloom", "no place for another attention"),
    ],
)
def test_other_families_run_on_torch_and_it_is_said_once(
    name: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = resolve(str(make_checkpoint(tmp_path, name)))
    with caplog.at_level(logging.INFO, "llmasos"):
        blocks = load_blocks(spec, Span(1, 3))
    assert blocks.runs_on == "torch"
    (line,) = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert reason in line
    for options in ({"engine": "native"}, {"quantize": "int4"}):
        with pytest.raises(UnsupportedModelError, match=reason):
            load_blocks(spec, Span(1, 3), **options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "relu"}, "activation"),
        ({"hidden_act": "gelu"}, "activation"),
    ],
)
def test_other_activations_run_on_torch(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    spec = resolve(str(make_checkpoint(tmp_path, "llama", **change)))
    assert load_blocks(spec, Span(1, 3)).runs_on == "torch"
    with pytest.raises(UnsupportedModelError, match=reason):
        load_blocks(spec, Span(1, 3), engine="native")


@pytest.mark.parametrize("name", ["olmo2", "granite", "phi3", "cohere", "glm4", "exaone4", "mixtral", "starcoder2"])
def test_look_alikes_are_found_out_even_if_their_names_were_on_the_list(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmasos.blocks.llama_shape.FAMILIES", {name})
    spec = resolve(str(make_checkpoint(tmp_path, name)))
    with pytest.raises(UnsupportedModelError):
        load_blocks(spec, Span(1, 4), engine="native")


def test_a_wrong_result_is_refused(split_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, real = split_of("llama").spec, loading.shape_of

    def wrong(*args: Any) -> Any:
        shape = real(*args)
        object.__setattr__(shape, "scale", shape.scale * 1.1)
        return shape

    monkeypatch.setattr(loading, "shape_of", wrong)
    with pytest.raises(UnsupportedModelError, match="block 1 gives other results"):
        load_blocks(spec, Span(1, 3), engine="native")
    assert load_blocks(spec, Span(1, 3)).runs_on == "torch"


def test_wrong_options_are_refused_by_name(split_of: Any) -> None:
    spec = split_of("llama").spec
    with pytest.raises(UsageError, match="no engine 'steam'"):
        load_blocks(spec, Span(1, 3), engine="steam")
    with pytest.raises(UsageError, match="torch does not run int8"):
        load_blocks(spec, Span(1, 3), engine="torch", quantize="int8")
    for options in ({"quantize": "int3"}, {"dtype": "float16", "engine": "native"}):
        with pytest.raises(UnsupportedModelError, match="they do not compute in"):
            load_blocks(spec, Span(1, 3), **options)


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_a_library_torch_runs_everything(
    content: bytes | None, split_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, path = split_of("llama").spec, tmp_path / "_kernels.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
    assert load_blocks(spec, Span(1, 3)).runs_on == "torch"
    with pytest.raises(UnsupportedModelError, match="compiled kernels"):
        load_blocks(spec, Span(1, 3), engine="native")


def test_a_stale_library_is_not_used(split_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llmasos.blocks.native import compile as build

    copy = tmp_path / "_kernels.so"
    copy.write_bytes(build.LIBRARY.read_bytes())
    monkeypatch.setenv(LIBRARY_VARIABLE, str(copy))
    monkeypatch.setattr(build, "digest", lambda: "of other sources")
    with pytest.raises(UnsupportedModelError, match="not of these sources"):
        load_blocks(split_of("llama").spec, Span(1, 3), engine="native")


# --- facts -----------------------------------------------------------------------------------------------------------


def test_facts_of_a_layer() -> None:
    gemma = make_model("gemma2").model.layers[0]
    shape = shape_of(gemma, "gemma2")
    assert (shape.activation, shape.softcap, shape.rotates) == ("gelu_tanh", 1.5, True)
    assert shape.scale == pytest.approx(13**-0.5)
    assert [bool(name) for name in shape.norms] == [True, True, True, True]
    smol = make_model("smollm3").model.layers
    assert [shape_of(layer, "smollm3").rotates for layer in smol] == [True, True, False, True, True]
    odd = make_model("llama").model.layers[0]
    odd.self_attn.extra = torch.nn.Identity()
    with pytest.raises(MisfitError, match="differs in extra"):
        shape_of(odd, "llama")


def test_windows_are_read_off_the_masks(split_of: Any) -> None:
    blocks = split_of("gemma3_text").load_as("native", Span(0, 5))
    patterns, tables = blocks._angles.patterns, blocks._angles.table_of
    assert [window_of(patterns[index]) for index in range(5)] == [9, 9, UNLIMITED, 9, UNLIMITED]
    assert [tables[index] for index in range(5)] == [0, 0, 1, 0, 1]
