"""Blocks on another device than the CPU: what meets in an operation lies on the same one."""

from typing import Any

import pytest
import torch

from llmasos.blocks import layers, trial
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, load_blocks
from llmasos.span import Span
from tests.blocks.conftest import Split
from tests.checkpoints import FAMILIES, HIDDEN

SPAN = Span(1, 4)
STEPS = ((5, 1), (1, 1), (1, 1))
"""Rows of two sessions that share each pass: a prompt beside a token, then tokens."""


def through(blocks: DecoderBlocks) -> list[torch.Tensor]:
    """What comes out for the same rows each time."""
    random = torch.Generator().manual_seed(4)
    caches, outputs = [blocks.new_cache(), blocks.new_cache()], []
    for counts in STEPS:
        rows = [torch.randn(count, HIDDEN, generator=random) for count in counts]
        given = zip(caches, rows, strict=True)
        outputs += blocks.forward([BlockChunk(cache, SPAN, cache.length, part) for cache, part in given])
    return outputs


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "olmo2", "bloom", "gptj"])
def test_no_tensor_is_left_on_the_cpu(family: str, split_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on "meta" have a device and no numbers: what would meet one of the CPU raises, as it would on a GPU."""
    monkeypatch.setattr(layers, "left_on_meta", lambda _: [])
    monkeypatch.setattr(trial, "deviation", lambda _: 0.0)
    blocks = load_blocks(split_model(family).spec, SPAN, engine="torch", device="meta")
    assert [rows.device.type for rows in through(blocks)] == ["meta"] * 6
    assert blocks.kv_bytes_per_token > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_what_the_cpu_does(family: str, split_model: Any) -> None:
    split: Split = split_model(family)
    expected = through(load_blocks(split.spec, SPAN, engine="torch"))
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 5e-2)):
        found = through(load_blocks(split.spec, SPAN, engine="torch", device="cuda", dtype=dtype))
        for rows, right in zip(found, expected, strict=True):
            assert rows.device.type == "cuda"
            assert (rows.float().cpu() - right).norm() < tolerance * right.norm()
