"""Which bits of a session's result depend on whom it shares a forward pass with.

On a CPU, in packed models with dense layers whose widths are multiples of 32, as all published ones are: none do.
With other widths the last numbers of a batch go through torch's scalar code instead of its vector code, which rounds
otherwise. Results agree to rounding only, too, where a prompt was cut in another way (the attention kernel sums in
another order for one query than for many) and where experts are chosen per row (the matrices multiplied have as many
rows as chose the expert).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmasos.blocks.devices import DTYPES
from llmasos.blocks.kv_cache import SessionCache
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, load_blocks
from llmasos.blocks.registry import ModelSpec, resolve
from llmasos.span import Span
from tests.blocks.conftest import Split
from tests.checkpoints import FAMILIES, HIDDEN, make_checkpoint

DENSE = ["llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "cohere"]
WIDTH = 128
LENGTHS = [1, 1, 17, 40, 1, 5]


@pytest.fixture(params=DENSE)
def wide(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    """A model whose widths are multiples of 32."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 192, "num_attention_heads": 4}
    own = {
        "gpt2": {"n_embd": WIDTH, "n_inner": 192, "n_head": 4},
        "opt": {"hidden_size": WIDTH, "ffn_dim": 192, "num_attention_heads": 4, "word_embed_proj_dim": WIDTH},
    }
    heads = {"head_dim": 32} if "head_dim" in FAMILIES[request.param] else {}
    return resolve(str(make_checkpoint(tmp_path, request.param, **own.get(request.param, {**sizes, **heads}))))


def run(blocks: DecoderBlocks, parts: list[tuple[SessionCache, torch.Tensor]]) -> list[torch.Tensor]:
    return blocks.forward([BlockChunk(cache, blocks.span, cache.length, rows) for cache, rows in parts])


def in_company(blocks: DecoderBlocks, prompt: torch.Tensor, row: torch.Tensor, others: int) -> torch.Tensor:
    """A prompt and one more row of a session, each in a batch with `others` sessions."""
    cache = blocks.new_cache()
    like = prompt.new_empty
    rest = [(blocks.new_cache(), like(LENGTHS[i % len(LENGTHS)], prompt.shape[1]).normal_()) for i in range(others)]
    out = run(blocks, [*rest[1:], (cache, prompt), *rest[:1]])[max(0, others - 1)]
    more = [(other, like(1 + i % 3, prompt.shape[1]).normal_()) for i, (other, _) in enumerate(rest)]
    return torch.cat([out, run(blocks, [(cache, row), *more])[0]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_changes_no_bit(wide: ModelSpec, dtype: str) -> None:
    blocks = load_blocks(wide, Span(1, 5), dtype=dtype, engine="torch")
    for seed in range(3):
        torch.manual_seed(seed)
        prompt, row = torch.randn(13, WIDTH).to(DTYPES[dtype]), torch.randn(1, WIDTH).to(DTYPES[dtype])
        alone = in_company(blocks, prompt, row, 0)
        for others in (1, 4, 15):
            assert torch.equal(in_company(blocks, prompt, row, others), alone), f"{others} others, seed {seed}"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama4_text", "gpt_oss"])
def test_company_changes_experts_by_rounding_only(family: str, split_model: Any) -> None:
    blocks = split_model(family).load(Span(1, 5))
    prompt, row = torch.randn(13, HIDDEN), torch.randn(1, HIDDEN)
    alone = in_company(blocks, prompt, row, 0)
    torch.testing.assert_close(in_company(blocks, prompt, row, 5), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_how_a_prompt_is_cut_changes_rounding_only(family: str, split_model: Any) -> None:
    split: Split = split_model(family)
    blocks = split.load(Span(1, 5))
    rows = torch.randn(70, HIDDEN)
    (whole,) = run(blocks, [(blocks.new_cache(), rows)])
    for cuts in ([1] * 70, [64, 6], [13, 1, 56]):
        cache = blocks.new_cache()
        parts = torch.cat([run(blocks, [(cache, part)])[0] for part in rows.split(cuts)])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
