"""The simulated side of the Runner seam: a cost model for time, and arithmetic that notices every mistake.

A row is one number of 61 bits. Block `b` turns the row `x` at position `p` into

    y(b, p) = (A * y(b, p - 1) + B * x + C * (b + 1) + D * (p + 1)) mod (2^61 - 1)

so that each output depends on every row before it, on the block and on the position: an activation that is lost,
repeated, reordered or sent to the wrong block makes a wrong number, and with it a wrong token, for ever after. The
numbers do not depend on how blocks are split over peers, nor on how rows are cut into chunks: as in the real thing.
"""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise

from llmasos.config import DType
from llmasos.peer.runner import Chunk, Fault, Speed
from llmasos.span import Span
from llmasos.wire import Tensor

PRIME = 2**61 - 1
A, B, C, D = 6_364_136_223_846_793_005 % PRIME, 1_442_695_040_888_963_407 % PRIME, 2_862_933_555_777_941_757 % PRIME, 3
HIDDEN = 2  # two float32: the eight bytes of a number
ROW_BYTES = 8


class SimRunner:
    """Runs `span` at `speed`; `slowdown` stretches the time of every pass."""

    def __init__(
        self, span: Span, speed: Speed, *, slowdown: float = 1.0, after_pass: Callable[[], None] = lambda: None
    ) -> None:
        self.slowdown = slowdown
        self.passes = 0
        self.busy_s = 0.0
        self._span = span
        self._speed = speed
        self._after_pass = after_pass
        self._caches: dict[str, dict[int, array[int]]] = {}  # session -> block -> outputs by position

    @property
    def span(self) -> Span:
        """The blocks it holds."""
        return self._span

    @property
    def hidden_size(self) -> int:
        """Width of a row, in numbers of the wire."""
        return HIDDEN

    @property
    def dtype(self) -> DType:
        """What its rows are called on the wire."""
        return "float32"

    async def run(self, chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        """See `Runner.run`: takes the time that the cost model says."""
        results = [self._compute(chunk) for chunk in chunks]
        self.passes += 1
        seconds = self._pass_s(chunks)
        self.busy_s += seconds
        await asyncio.sleep(seconds)
        self._after_pass()
        return results

    async def measure(self) -> Speed:
        """The cost model itself."""
        return self._speed

    def fork(self, source: str, target: str, tokens: int) -> None:
        """See `Runner.fork`."""
        self._caches[target] = {block: outputs[:tokens] for block, outputs in self._caches[source].items()}

    def release(self, session: str) -> None:
        """See `Runner.release`."""
        self._caches.pop(session, None)

    async def close(self) -> None:
        """See `Runner.close`."""
        self._caches.clear()

    def _pass_s(self, chunks: Sequence[Chunk]) -> float:
        """Each block runs once a pass, over the rows of the sessions that use it."""
        edges = sorted({edge for chunk in chunks for edge in (chunk.span.start, chunk.span.end)})
        seconds = 0.0
        for start, end in pairwise(edges):
            rows = sum(chunk.hidden.tokens for chunk in chunks if chunk.span.start <= start and end <= chunk.span.end)
            if rows:
                seconds += (end - start) * (self._speed.first_row_s + (rows - 1) * self._speed.row_s)
        return seconds * self.slowdown

    def _compute(self, chunk: Chunk) -> Tensor | Fault:
        hidden = chunk.hidden
        if (hidden.dtype, hidden.hidden) != (self.dtype, HIDDEN):
            return Fault(f"expected float32 rows of {HIDDEN}, got {hidden.dtype} rows of {hidden.hidden}", sender=True)
        caches = self._caches.get(chunk.session)
        if caches is None:
            caches = self._caches[chunk.session] = {block: array("Q") for block in chunk.span.blocks()}
        cached = len(caches[chunk.span.start])
        if chunk.position > cached:
            return Fault(f"rows at position {chunk.position}, but {cached} are cached", sender=True)
        rows = to_numbers(hidden)
        if any(row >= PRIME for row in rows):
            return Fault("the activations hold numbers that are none", sender=True)
        if cached > chunk.position:
            for block in chunk.span.blocks():
                del caches[block][chunk.position :]
        if len(rows) == 1:  # decoding: most of what a simulation computes
            rows = [run_row(caches, chunk.span, chunk.position, rows[0])]
        else:
            for block in chunk.span.blocks():
                rows = run_block(block, caches[block], rows)
        return from_numbers(rows)


def run_block(block: int, cache: "array[int]", rows: Sequence[int]) -> list[int]:
    """The outputs of one block for `rows` behind what `cache` holds; appends them to it."""
    before = cache[-1] if cache else 0
    outputs = []
    for position, row in enumerate(rows, start=len(cache)):
        before = (A * before + B * row + C * (block + 1) + D * (position + 1)) % PRIME
        outputs.append(before)
    cache.extend(outputs)
    return outputs


def run_row(caches: "dict[int, array[int]]", span: Span, position: int, row: int) -> int:
    """The same for a single row at `position`, through all blocks of `span`."""
    due = D * (position + 1)
    for block in range(span.start, span.end):
        cache = caches[block]
        row = (A * (cache[-1] if cache else 0) + B * row + C * (block + 1) + due) % PRIME
        cache.append(row)
    return row


def reference(blocks: int, rows: Sequence[int]) -> list[int]:
    """What a single machine makes of `rows`, with no cache and no network."""
    outputs = list(rows)
    for block in range(blocks):
        outputs = run_block(block, array("Q"), outputs)
    return outputs


class Reference:
    """A single machine that takes rows as they come: what each answer of a swarm has to be."""

    def __init__(self, blocks: int) -> None:
        self.length = 0
        self._last = [0] * blocks  # the output of each block at the position before

    def feed(self, rows: Sequence[int]) -> int:
        """The output of the last block for the last of `rows`."""
        row = 0
        last = self._last
        for row in rows:
            self.length += 1
            due = D * self.length
            for block, before in enumerate(last):
                last[block] = row = (A * before + B * row + C * (block + 1) + due) % PRIME
        return row


def to_numbers(tensor: Tensor) -> list[int]:
    """The numbers in a tensor of the simulator."""
    data = bytes(tensor.data)
    return [int.from_bytes(data[at : at + ROW_BYTES], "little") for at in range(0, len(data), ROW_BYTES)]


def from_numbers(rows: Sequence[int]) -> Tensor:
    """Numbers as a tensor of (rows, HIDDEN)."""
    data = b"".join(row.to_bytes(ROW_BYTES, "little") for row in rows)
    return Tensor("float32", (len(rows), HIDDEN), memoryview(data))
