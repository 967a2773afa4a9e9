"""Decoder blocks that the compiled library runs. To whoever serves them they are blocks like all others."""

import torch

from llmasos.blocks.anatomy import Anatomy
from llmasos.blocks.chain import Chain
from llmasos.blocks.kv_cache import SessionCache
from llmasos.blocks.layers import BlockChunk, DecoderBlocks
from llmasos.blocks.native.angles import Angles
from llmasos.blocks.native.stack import Cache, Stack
from llmasos.blocks.registry import ModelSpec
from llmasos.span import Span


class NativeCache(SessionCache):
    """The kv of one session, in pages of the library: float32, made by need, freed when cut off."""

    def __init__(self, loaded: Span, stack: Stack) -> None:
        super().__init__(loaded)
        self._stack = stack
        self.pages = stack.new_cache()

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

    def _run_packed(self, span: Span, chunks: list[BlockChunk]) -> list[torch.Tensor]:
        """All chunks in one forward pass."""
        rows = torch.cat([chunk.hidden.to(torch.float32) for chunk in chunks])  # (rows, hidden), memory of its own
        self._angles.cover(max(chunk.position + len(chunk.hidden) for chunk in chunks))
        first = span.start - self.span.start
        placed = [(_pages(chunk.cache), chunk.position, len(chunk.hidden)) for chunk in chunks]
        self._stack.forward(first, first + len(span), placed, rows.numpy())
        rows = rows.to(self.torch_dtype)
        if len(chunks) == 1:
            return [rows]
        # Copies: whoever keeps one session's rows must not keep the whole batch alive.
        return [part.clone() for part in torch.split(rows, [len(chunk.hidden) for chunk in chunks])]


def _pages(cache: SessionCache) -> Cache:
    assert isinstance(cache, NativeCache), "a cache of other blocks"
    return cache.pages
