"""The Runner of a real peer: torch, on one compute thread of its own.

The event loop stays free while a pass runs - pings are answered, frames are read - because torch drops the interpreter
lock inside its kernels (measured: a stream echo takes 0.77 ms beside a computing thread, 0.68 ms without).
"""

import asyncio
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from llmasos.blocks.anatomy import MISFITS
from llmasos.blocks.devices import DTYPES
from llmasos.blocks.kv_cache import SessionCache
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, WireChunk
from llmasos.blocks.tensors import is_finite, wire_dtype
from llmasos.config import DType
from llmasos.errors import LLMasOSError, UsageError
from llmasos.peer.runner import Chunk, Fault, Speed
from llmasos.span import Span
from llmasos.wire import Tensor

PROBE_ROWS = 64
"""Rows of the second probe: enough that what they cost shows over the noise (1 to 16 cost about the same)."""
MIN_ROW_S = 1e-7
"""What a further row costs at least, when noise says that it costs nothing."""
PROBE_PASSES = 5
"""Passes of each probe; the median is announced."""
FAILURES = (LLMasOSError, MemoryError, *MISFITS)
"""What blocks may raise over the rows of one session, and what must not end the peer."""


class TorchRunner:
    """Runs a span of decoder blocks. How many threads torch uses in a pass is OMP_NUM_THREADS's to say."""

    def __init__(self, blocks: DecoderBlocks) -> None:
        self._blocks = blocks
        self._dtype: DType = wire_dtype(blocks.dtype)
        self._caches: dict[str, SessionCache] = {}
        self._thread = ThreadPoolExecutor(1, "compute")

    @property
    def span(self) -> Span:
        """The blocks it holds."""
        return self._blocks.span

    @property
    def hidden_size(self) -> int:
        """Width of the rows between blocks."""
        return self._blocks.hidden_size

    @property
    def dtype(self) -> DType:
        """The numbers it takes and gives."""
        return self._dtype

    @property
    def kv_bytes(self) -> int:
        """Memory that the kv caches take now."""
        return sum(cache.nbytes for cache in self._caches.values())

    async def run(self, chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        """See `Runner.run`."""
        results = self._thread.submit(self._run, chunks)
        answer = asyncio.wrap_future(results)
        results.add_done_callback(self._prepare)  # on the compute thread, behind what wakes the loop
        return await answer

    async def measure(self) -> Speed:
        """See `Runner.measure`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._measure)

    def fork(self, source: str, target: str, tokens: int) -> None:
        """See `Runner.fork`."""
        self._caches[target] = self._caches[source].fork(tokens)

    def release(self, session: str) -> None:
        """See `Runner.release`."""
        self._caches.pop(session, None)

    async def close(self) -> None:
        """See `Runner.close`."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        self._caches.clear()

    # --- on the compute thread -------------------------------------------------------------------------------------

    def _run(self, chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        prepared = [self._checked(chunk) for chunk in chunks]
        outputs = iter(self._forward([chunk for chunk in prepared if isinstance(chunk, WireChunk)]))
        return [next(outputs) if isinstance(chunk, WireChunk) else chunk for chunk in prepared]

    def _prepare(self, _: object) -> None:
        self._blocks.prepare()

    def _checked(self, chunk: Chunk) -> WireChunk | Fault:
        """Check a chunk, and bring its cache to where it begins."""
        cache = self._caches.get(chunk.session)
        if cache is None:
            cache = self._caches[chunk.session] = self._blocks.new_cache()
        if chunk.position > cache.length:
            return Fault(f"rows at position {chunk.position}, but {cache.length} are cached", sender=True)
        try:
            cache.truncate(chunk.position)  # copies a page that others share
        except FAILURES as error:
            return Fault(f"the blocks failed: {error}", sender=False)
        if chunk.hidden.dtype != self._dtype or chunk.hidden.hidden != self.hidden_size:
            expected = f"{self._dtype} rows of {self.hidden_size}"
            return Fault(f"expected {expected}, got {chunk.hidden.dtype} rows of {chunk.hidden.hidden}", sender=True)
        return WireChunk(cache, chunk.span, chunk.position, chunk.hidden)

    def _forward(self, chunks: list[WireChunk]) -> list[Tensor | Fault]:
        """One pass. When it fails as a whole, each chunk is tried alone, so that only the guilty session fails."""
        if not chunks:
            return []
        try:
            outputs = self._blocks.forward_wire(chunks)
        except FAILURES as error:
            for chunk in chunks:
                chunk.cache.truncate(chunk.position)
            if len(chunks) == 1:
                return [
                    self._poisoned(chunks[0]) or Fault(f"the blocks failed: {error}", isinstance(error, UsageError))
                ]
            return [self._forward([chunk])[0] for chunk in chunks]
        return [rows if is_finite(rows) else self._overflow(chunk) for chunk, rows in zip(chunks, outputs, strict=True)]

    def _overflow(self, chunk: WireChunk) -> Fault:
        """Why rows came out that are not finite. Whatever goes in comes out again, so only then is it looked at."""
        chunk.cache.truncate(chunk.position)
        return self._poisoned(chunk) or Fault(f"the activations overflowed {self._dtype}", sender=False)

    def _poisoned(self, chunk: WireChunk) -> Fault | None:
        return None if is_finite(chunk.hidden) else Fault("the activations hold NaN or infinity", sender=True)

    def _measure(self) -> Speed:
        one, many = self._time_pass(1), self._time_pass(PROBE_ROWS)
        blocks = len(self.span)
        return Speed(first_row_s=one / blocks, row_s=max((many - one) / (PROBE_ROWS - 1) / blocks, MIN_ROW_S))

    def _time_pass(self, rows: int) -> float:
        hidden = torch.randn(rows, self.hidden_size, generator=torch.Generator().manual_seed(rows))
        hidden = hidden.to(self._blocks.device, DTYPES[self._dtype])
        cache = self._blocks.new_cache()
        seconds = []
        for _ in range(PROBE_PASSES):
            begin = time.perf_counter()
            output = self._blocks.forward([BlockChunk(cache, self.span, cache.length, hidden)])[0]
            output.cpu()  # waits for the device
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)
