"""Decoder blocks that the compiled library runs. To whoever serves them they are blocks like all others."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from llmasos.blocks.anatomy import Anatomy
from llmasos.blocks.angles import Angles
from llmasos.blocks.chain import Chain
from llmasos.blocks.kv_cache import SessionCache
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, WireChunk
from llmasos.blocks.native.stack import Cache, Stack
from llmasos.blocks.registry import ModelSpec
from llmasos.blocks.tensors import from_floats, to_floats
from llmasos.span import Span
from llmasos.wire import Tensor


class NativeCache(SessionCache):
    """The kv of one session, in pages of the library: float32, made by need, freed when cut off."""

    def __init__(self, loaded: Span, stack: Stack, pages: Cache | None = None) -> None:
        super().__init__(loaded)
        self._stack = stack
        self.pages = pages or stack.new_cache()

    @property
    def nbytes(self) -> int:
        """Bytes held, unused positions of pages included."""
        return self.pages.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the blocks of this session."""
        return 0 if self.span is None else len(self.span) * self._stack.kv_bytes_per_token

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, and free the pages behind them."""
        super().truncate(length)
        self.pages.truncate(length)

    def fork(self, length: int) -> "NativeCache":
        """A cache of its own with the first `length` tokens, whole pages; their memory is shared."""
        self._check_fork(length)
        forked = NativeCache(self.loaded, self._stack, self.pages.fork(length))
        forked.span, forked.length = self.span, length
        return forked


class NativeBlocks(DecoderBlocks):
    """The blocks `span` of a model, compiled. Whatever the weights are kept as, rows and kv are float32 in here.

    The result for a session is bit for bit the same whoever shares the call, however its prompt was cut, with any
    number of threads, and on every x86-64 machine with AVX2.
    """

    def __init__(
        self,
        spec: ModelSpec,
        span: Span,
        dtype: str,
        device: str,
        body: Anatomy,
        chain: Chain,
        stack: Stack,
        angles: Angles,
        quantize: str,
    ) -> None:
        super().__init__(spec, span, dtype, device, body, chain)
        self.weight_bytes = stack.weight_bytes
        self.kv_bytes_per_token = len(span) * stack.kv_bytes_per_token
        self.quantization = quantize
        self.runs_on = f"compiled kernels ({stack.variant})"
        self._stack = stack
        self._angles = angles

    def new_cache(self) -> NativeCache:
        """An empty kv cache for one session on these blocks, or on a part of them."""
        return NativeCache(self.span, self._stack)

    def forward_wire(self, chunks: Sequence[WireChunk]) -> list[Tensor]:
        """`forward` for rows as they travel. Nothing of torch stands in the way of a step."""
        spans = {chunk.span for chunk in chunks}
        if len(spans) != 1 or not all(chunk.hidden.tokens for chunk in chunks):
            return super().forward_wire(chunks)
        self._check(chunks)
        rows = to_floats([chunk.hidden for chunk in chunks])
        for chunk in chunks:
            chunk.cache.span = chunk.span
        self._compute(spans.pop(), chunks, rows)
        for chunk in chunks:
            chunk.cache.length += chunk.hidden.tokens
        if len(chunks) == 1:
            return [from_floats(rows, chunks[0].hidden.dtype)]
        # Copies: whoever keeps one session's rows must not keep the whole batch alive.
        ends = accumulate(chunk.hidden.tokens for chunk in chunks)
        return [
            from_floats(rows[end - chunk.hidden.tokens : end].copy(), chunk.hidden.dtype)
            for chunk, end in zip(chunks, ends, strict=True)
        ]

    def prepare(self) -> None:
        """Have memory ready for kv to come."""
        self._stack.prepare()

    def _run_packed(self, span: Span, chunks: list[BlockChunk]) -> list[torch.Tensor]:
        """All chunks in one forward pass."""
        rows = torch.cat([chunk.hidden.to(torch.float32) for chunk in chunks])  # (rows, hidden), memory of its own
        self._compute(span, chunks, rows.numpy())
        rows = rows.to(self.torch_dtype)
        if len(chunks) == 1:
            return [rows]
        return [part.clone() for part in torch.split(rows, [len(chunk.hidden) for chunk in chunks])]

    def _compute(
        self, span: Span, chunks: Sequence[BlockChunk] | Sequence[WireChunk], rows: NDArray[np.float32]
    ) -> None:
        """Run the rows of all chunks, (tokens, hidden), through `span` in place."""
        placed = [(_pages(chunk.cache), chunk.position, chunk.hidden.shape[0]) for chunk in chunks]
        if self._angles.cover(max(position + tokens for _, position, tokens in placed)):
            set_rotary(self._stack, self._angles)
        first = span.start - self.span.start
        self._stack.forward(first, first + len(span), placed, rows)


def set_rotary(stack: Stack, angles: Angles) -> None:
    """Give the stack its rotary tables, or longer ones."""
    for table, (cosines, sines) in enumerate(angles.tables):
        stack.set_rotary(table, cosines.numpy(), sines.numpy())


def _pages(cache: SessionCache) -> Cache:
    assert isinstance(cache, NativeCache), "a cache of other blocks"
    return cache.pages
