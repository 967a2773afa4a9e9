"""What cannot be served block by block is refused by name, with the reason, before a weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmasos.blocks.anatomy import context_tokens
from llmasos.blocks.layers import BlockChunk, load_blocks
from llmasos.blocks.registry import resolve
from llmasos.errors import CheckpointError, UnsupportedModelError, UsageError
from llmasos.span import Span
from tests.checkpoints import FAMILIES, HIDDEN, make_checkpoint, make_model

SIZES = {"num_hidden_layers": 4, "hidden_size": 48}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"d_model": 48, "num_layers": 4}, "t5 models .*: it has an encoder and a decoder"),
    "bart": ({}, "bart models .*: it has an encoder and a decoder"),
    "mamba": (SIZES, "mamba models .*: it has linear_attention layers"),
    "rwkv": (SIZES, "rwkv models .*: they carry a recurrent state"),
    "qwen3_next": (SIZES, "qwen3_next models .*: it has linear_attention layers"),
    "jamba": (SIZES, "jamba models .*: it has linear_attention layers"),
    "lfm2": (
        {**SIZES, "layer_types": ["conv", "conv", "full_attention", "conv"]},
        "lfm2 models .*: it has conv layers",
    ),
    "gemma3n_text": (SIZES, "gemma3n_text models .*: some of its layers use the kv of other layers"),
    "gemma4_text": ({**SIZES, "num_kv_shared_layers": 0}, "gemma4_text models .*: its layers take inputs of their own"),
    "gemma3": ({}, "gemma3 models .*: it is multimodal"),
    "musicgen": ({}, "musicgen"),
    "vit": (SIZES, "vit models .*: transformers has no causal language model class"),
    "bert": (SIZES, "bert models .*: BertEncoder, which runs their layers, takes no inputs_embeds"),
    "xlnet": ({"d_model": 48, "n_layer": 4}, "xlnet models .*: XLNetModel, which runs their layers, takes no"),
    "openai-gpt": ({"n_embd": 48, "n_layer": 4}, "openai-gpt models .* takes no past_key_values"),
    "gpt2": (
        {"n_embd": 48, "n_layer": 4, "n_head": 4, "add_cross_attention": True},
        "gpt2 models .*: it has cross-attention",
    ),
    "llama": (
        {**SIZES, "num_attention_heads": 4, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantised",
    ),
    "homegrown": ({"auto_map": {"AutoConfig": "x.Y"}}, "homegrown models bring their own code"),
    "unheard_of": ({}, "transformers knows no family 'unheard_of'"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_fit_is_refused_by_name(family: str, tmp_path: Path) -> None:
    config, message = REFUSED[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **config}))
    with pytest.raises((UnsupportedModelError, CheckpointError), match=message) as caught:
        resolve(str(tmp_path))
    assert family == "musicgen" or isinstance(caught.value, UnsupportedModelError)


def spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, replacement: Any) -> str:
    """The name of a llama model whose code behaves in a way that no config tells."""
    monkeypatch.setattr(f"transformers.models.llama.modeling_llama.{target}", replacement)
    return str(make_checkpoint(tmp_path, "llama"))


def test_attention_that_looks_ahead_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def averaging(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return original(self, rows) + rows.mean(dim=1, keepdim=True)

    original = modeling_llama.LlamaMLP.forward
    name = spoiled(tmp_path, monkeypatch, "LlamaMLP.forward", averaging)
    with pytest.raises(UnsupportedModelError, match=r"llama models .* other results when they run apart"):
        load_blocks(resolve(name), Span(0, 3))


def test_blocks_that_look_at_the_embeddings_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def leaking(self: Any, rows: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = original(self, rows, position_ids)
        return cos + 0.1 * rows.mean(dim=-1, keepdim=True), sin

    original = modeling_llama.LlamaRotaryEmbedding.forward
    name = spoiled(tmp_path, monkeypatch, "LlamaRotaryEmbedding.forward", leaking)
    with pytest.raises(UnsupportedModelError, match=r"llama models .* other results when they run apart"):
        load_blocks(resolve(name), Span(0, 3))


def test_code_that_breaks_is_not_our_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(self: Any, rows: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no attribute conv_state")

    name = spoiled(tmp_path, monkeypatch, "LlamaMLP.forward", breaking)
    with pytest.raises(UnsupportedModelError, match=r"their code fails when blocks run apart .*conv_state"):
        load_blocks(resolve(name), Span(0, 3))


def test_dynamic_rope_ends_where_it_would_change(tmp_path: Path) -> None:
    """Up to there it is exact; behind it, keys that are cached already would belong to another embedding."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.1] * 4, "long_factor": [3.0] * 4}
    folder = make_checkpoint(
        tmp_path, "phi3", original_max_position_embeddings=30, rope_parameters=rope, sliding_window=None
    )
    spec = resolve(str(folder))
    assert spec.context_tokens == 30
    blocks = load_blocks(spec, Span(1, 3))
    cache = blocks.new_cache()
    blocks.forward([BlockChunk(cache, blocks.span, 0, torch.zeros(30, HIDDEN))])
    with pytest.raises(UsageError, match="position 31 lies behind the 30 tokens"):
        blocks.forward([BlockChunk(cache, blocks.span, 30, torch.zeros(1, HIDDEN))])
    assert context_tokens(make_model("llama-dynamic").config) == (120, True)
    assert context_tokens(make_model("llama3-rope").config) == (120, False)
    assert FAMILIES["llama3-rope"]["rope_parameters"]["original_max_position_embeddings"] == 30
