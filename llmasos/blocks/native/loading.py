"""Loads blocks into the compiled library, one at a time, and compares each with its family's own code.

A block is read as transformers reads it, packed, run by both on a few random rows, and dropped on the torch side: no
two copies of all weights exist at once. Where weights are rounded, the family's code is given what the kernels multiply
by, so that the comparison is as strict as in float32; what rounding does to the results is for a benchmark to say.
"""

from itertools import pairwise

import numpy as np
import torch
from transformers import DynamicCache

from llmasos.blocks.anatomy import MISFITS, Anatomy, dissect
from llmasos.blocks.angles import Angles
from llmasos.blocks.chain import Chain, mute
from llmasos.blocks.layers import DecoderBlocks
from llmasos.blocks.llama_shape import MisfitError, shape_of, window_of
from llmasos.blocks.loading import Loader, Progress, left_on_meta
from llmasos.blocks.native.blocks import NativeBlocks, set_rotary
from llmasos.blocks.native.library import available, library, why_not
from llmasos.blocks.native.packing import packed
from llmasos.blocks.native.stack import KINDS, PAGE_TOKENS, Stack
from llmasos.blocks.registry import ModelSpec
from llmasos.span import Span

_TOLERANCE = 2e-4
"""Relative error in the norm; rounding makes 1e-6 of it, a mistake more than 1e-2."""
_CUTS = (0, 4, 5, 7)
_LONG_CUTS = (0, 3, PAGE_TOKENS - 1, PAGE_TOKENS + 1, PAGE_TOKENS + 2)
"""For the first block of each kind: across the end of a page."""


def load_natively(
    spec: ModelSpec, span: Span, *, dtype: str, device: str, quantize: str = "none", progress: Progress | None = None
) -> NativeBlocks:
    """Raises MisfitError where there are no compiled kernels, or they do not compute what the family does."""
    kind = _kind(dtype, device, quantize)
    # 1. The model without weights: is it of the right shape? Weights are read as float32 and packed from there.
    body = dissect(spec.config, "float32")
    if not body.packed:
        raise MisfitError(f"{spec.family} code has no place for another attention")
    prefix, layers = body.prefix, body.layers
    shapes = {index: shape_of(layers[index], spec.family) for index in span.blocks()}
    geometries = {shape.geometry for shape in shapes.values()}
    if len(geometries) != 1:
        raise MisfitError(f"{spec.family} blocks differ in their widths")
    loader = Loader(body.model, spec.source.checkpoint(), torch.float32, device)
    plan = {index: loader.tensors(f"{prefix}{index}.") for index in span.blocks()}
    chain = Chain(layers, span)
    setattr(body.owner, body.list_name, chain)
    mute(body.owner, chain)
    loader.settle(body.owner)
    lost = [name for name in left_on_meta(body.owner) if not name.startswith(f"{body.list_name}.")]
    if lost:
        raise MisfitError(f"{spec.family} models keep {lost[0]} outside of their blocks")
    # 2. What differs from block to block and is not in the weights.
    stack = Stack(geometries.pop(), torch.get_num_threads())
    rotating = [index for index, shape in shapes.items() if shape.rotates]
    angles = Angles(body, chain, span, rotating, torch.float32)
    set_rotary(stack, angles)
    windows = {index: window_of(pattern) for index, pattern in angles.patterns.items()}
    # 3. Block by block: read, pack, compare, drop.
    total, done = loader.nbytes(name for names in plan.values() for name in names), 0
    seen = set()
    for index, names in plan.items():
        missing = loader.load(names, f"block {index}")
        loader.refuse_missing(name for name in missing if name.startswith(f"{prefix}{index}."))
        sees = angles.table_of.get(index), windows[index]
        stack.add(packed(layers[index], shapes[index], kind, *sees))
        alone = DecoderBlocks(spec, Span(index, index + 1), "float32", device, body, chain)
        sort = (shapes[index], sees)
        short = sort in seen or stack.positions < _LONG_CUTS[-1]
        try:
            error = deviation(alone, stack, index - span.start, _CUTS if short else _LONG_CUTS)
        except MISFITS as reason:  # then torch says what is wrong with it
            raise MisfitError(f"{spec.family} code fails when block {index} runs apart ({reason})") from reason
        if not error <= 1:
            raise MisfitError(f"block {index} gives other results ({error:.1f} times the tolerated error)")
        seen.add(sort)
        layers[index].to("meta")
        done += loader.nbytes(names)
        if progress is not None:
            progress(done, total)
    return NativeBlocks(spec, span, dtype, device, _without_weights(body), chain, stack, angles, quantize)


def _kind(dtype: str, device: str, quantize: str) -> str:
    """How weights are kept. Raises MisfitError."""
    if not available():
        raise MisfitError(why_not())
    try:
        library().variant()
    except LookupError as error:
        raise MisfitError(str(error)) from error
    if torch.device(device).type != "cpu":
        raise MisfitError(f"they are for a CPU, not for {device}")
    kind = dtype if quantize == "none" else quantize
    if dtype not in ("float32", "bfloat16") or kind not in KINDS:
        raise MisfitError(f"they do not compute in {dtype if quantize == 'none' else f'{dtype} with {quantize}'}")
    return kind


def deviation(family: DecoderBlocks, stack: Stack, layer: int, cuts: tuple[int, ...]) -> float:
    """How far a layer of the stack is from the family's own block, relative to what is tolerated."""
    rows = torch.randn(cuts[-1], family.hidden_size, generator=torch.Generator().manual_seed(layer))
    expected = family.run_as_family(rows, DynamicCache()).numpy()
    mine, other = stack.new_cache(), stack.new_cache()
    parts = []
    for start, end in pairwise(cuts):
        # A second session beside it, in front or behind, with the same rows backwards.
        part = rows[start:end].numpy()
        both = [(mine, start, end - start), (other, start, end - start)]
        together = np.concatenate([part, part[::-1]] if start else [part[::-1], part])
        stack.forward(layer, layer + 1, both if start else both[::-1], together)
        parts.append(together[: end - start] if start else together[end - start :])
    error = float(np.linalg.norm(np.concatenate(parts) - expected))
    return error / max(float(np.linalg.norm(expected)), 1e-12) / _TOLERANCE


def _without_weights(body: Anatomy) -> Anatomy:
    lost = [name for name, tensor in body.owner.named_parameters() if not tensor.is_meta]
    assert not lost, f"{lost[0]} is held twice"
    return body
