"""A trial run of loaded blocks, before anyone relies on them.

Whether a family's blocks can be run apart, in chunks and in one batch with other sessions is in its code, and
families are not known by name here. So a few random rows go through the loaded blocks twice: once as the family
itself would do it, in one piece, with its own attention and transformers' own cache; and once as a peer does it, cut
into chunks and into two spans, with a second session beside it and with noise where the embeddings would be. It
finds attention that is not causal, blocks that look at the embeddings or at each other, kv that is not cut right,
and a packed attention that differs. It cannot find what depends on the weights of blocks that are not loaded.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from llmasos.span import Span

if TYPE_CHECKING:
    from llmasos.blocks.layers import DecoderBlocks

_TOKENS = 7
_CUTS = (0, 4, 5, 7)
_TOLERANCES = {torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Relative error in the norm, far above rounding (1e-6 in float32) and far below any mistake in what is attended to."""
_ATTEMPTS = 3
"""A router between experts may turn over on a rounding error; a mistake is there for every input."""


def deviation(blocks: "DecoderBlocks") -> float:
    """How far a peer's way of running `blocks` is from the family's own, relative to what is tolerated; above 1 is
    a mistake. Raises what the family's code raises when it does not fit."""
    random = torch.Generator().manual_seed(0)
    worst = float("inf")
    for _ in range(_ATTEMPTS):
        rows = torch.randn(_TOKENS, blocks.hidden_size, generator=random).to(blocks.device, blocks.torch_dtype)
        reference = blocks.run_as_family(rows, DynamicCache())
        served = _as_served(blocks, rows)
        error = (served.float() - reference.float()).norm() / reference.float().norm().clamp_min(1e-12)
        worst = min(worst, float(error) / _TOLERANCES[blocks.torch_dtype])
        if worst <= 1:
            break
    return worst


def _as_served(blocks: "DecoderBlocks", rows: torch.Tensor) -> torch.Tensor:
    from llmasos.blocks.layers import BlockChunk

    middle = blocks.span.start + len(blocks.span) // 2
    spans = [blocks.span]
    if middle > blocks.span.start:
        spans = [Span(blocks.span.start, middle), Span(middle, blocks.span.end)]
    for span in spans:
        cache, other = blocks.new_cache(), blocks.new_cache()
        outputs = []
        for start, end in pairwise(_CUTS):
            beside = BlockChunk(other, span, other.length, rows[start:end].flip(0))
            chunk = BlockChunk(cache, span, start, rows[start:end])
            outputs.append(blocks.forward([beside, chunk] if start else [chunk, beside])[-1 if start else 0])
        rows = torch.cat(outputs)
    return rows
