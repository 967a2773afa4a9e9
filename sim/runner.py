"""The simulated side of the Runner seam: a cost model for time, and arithmetic that notices every mistake.

A session is a sequence of numbers v(0), v(1), ... modulo a prime, which nobody sees. The row between the blocks `b - 1`
and `b` at position `p` is

    x(b, p) = A^b * v(p) + v(p - 1) + C^b * (p + 1)        v(-1) = 0

so that whoever holds some blocks finds v(p) from a row that comes in and the v(p - 1) that it has cached, and what goes
out from those two, however many its blocks are. An activation that is lost, repeated, reordered or sent to the wrong
block or position makes a wrong v, and with it, as no factor is zero, wrong rows and tokens for ever after. The numbers
do not depend on how blocks are split over peers, nor on how rows are cut into chunks: as in the real thing.
"""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from llmasos.config import DType
from llmasos.errors import UsageError
from llmasos.peer.runner import Chunk, Fault, Speed
from llmasos.span import Span
from llmasos.wire import Tensor

NUMBERS = 2**60 - 93
"""Rows are numbers below this, the largest prime that fits sixty bits."""
A, C = 6_364_136_223_846_793_005 % NUMBERS, 2_862_933_555_777_941_757 % NUMBERS
HIDDEN = 2  # two float32: the eight bytes of a number
ROW_BYTES = 8


class Blocks:
    """The blocks of a span, all at once."""

    def __init__(self, span: Span) -> None:
        self._found, self._c_in = pow(A, -span.start, NUMBERS), pow(C, span.start, NUMBERS)
        self._shown, self._c_out = pow(A, span.end, NUMBERS), pow(C, span.end, NUMBERS)

    def make(self, row: int, position: int, before: int) -> tuple[int, int]:
        """The v behind `row`, which is to be cached, and the output; `before` is the v of the row before it."""
        number = (row - before - self._c_in * (position + 1)) * self._found % NUMBERS
        return number, (self._shown * number + before + self._c_out * (position + 1)) % NUMBERS


blocks_of = cache(Blocks)
"""The blocks of a span, which all sessions share."""


@dataclass(slots=True)
class _Cache:
    """What one session has cached."""

    blocks: Blocks
    numbers: list[int] = field(default_factory=list)
    """By position."""


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
        self._caches: dict[str, _Cache] = {}  # by session

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
        cache = self._caches[source]
        if tokens > len(cache.numbers):
            raise UsageError(f"asked to share {tokens} tokens of {len(cache.numbers)}")
        self._caches[target] = _Cache(cache.blocks, cache.numbers[:tokens])

    def release(self, session: str) -> None:
        """See `Runner.release`."""
        self._caches.pop(session, None)

    async def close(self) -> None:
        """See `Runner.close`."""
        self._caches.clear()

    def _pass_s(self, chunks: Sequence[Chunk]) -> float:
        """Each block runs once a pass, over the rows of the sessions that use it."""
        edges = [chunks[0].span.start, chunks[0].span.end]
        if len(chunks) > 1:
            edges = sorted({edge for chunk in chunks for edge in (chunk.span.start, chunk.span.end)})
        seconds = 0.0
        for start, end in pairwise(edges):
            rows = sum([chunk.hidden.tokens for chunk in chunks if chunk.span.start <= start and end <= chunk.span.end])
            if rows:
                seconds += (end - start) * (self._speed.first_row_s + (rows - 1) * self._speed.row_s)
        return seconds * self.slowdown

    def _compute(self, chunk: Chunk) -> Tensor | Fault:
        hidden = chunk.hidden
        if (hidden.dtype, hidden.hidden) != (self.dtype, HIDDEN):
            return Fault(f"expected float32 rows of {HIDDEN}, got {hidden.dtype} rows of {hidden.hidden}", sender=True)
        cache = self._caches.get(chunk.session)
        if cache is None:
            cache = self._caches[chunk.session] = _Cache(blocks_of(chunk.span))
        make, cached = cache.blocks.make, cache.numbers
        if chunk.position > len(cached):
            return Fault(f"rows at position {chunk.position}, but {len(cached)} are cached", sender=True)
        rows = to_numbers(hidden)
        if max(rows, default=0) >= NUMBERS:
            return Fault("the activations hold numbers that are none", sender=True)
        del cached[chunk.position :]
        number = cached[-1] if cached else 0
        outputs: list[int] = []
        for position, row in enumerate(rows, start=chunk.position):
            number, output = make(row, position, number)
            cached.append(number)
            outputs.append(output)
        return from_numbers(outputs)


def reference(blocks: int, rows: Sequence[int]) -> list[int]:
    """What a single machine makes of `rows`, with no cache and no network."""
    machine = Reference(blocks)
    return [machine.feed([row]) for row in rows]


class Reference:
    """A single machine that takes rows as they come: what each answer of a swarm has to be."""

    def __init__(self, blocks: int) -> None:
        self.length = 0
        self._blocks = blocks_of(Span(0, blocks))
        self._number = self._output = 0

    def feed(self, rows: Sequence[int]) -> int:
        """The output of the last block for the last of `rows`."""
        for row in rows:
            self._number, self._output = self._blocks.make(row, self.length, self._number)
            self.length += 1
        return self._output


def to_numbers(tensor: Tensor) -> list[int]:
    """The numbers in a tensor of the simulator."""
    return tensor.data.cast("Q").tolist()


def from_numbers(rows: Sequence[int]) -> Tensor:
    """Numbers as a tensor of (rows, HIDDEN)."""
    return Tensor("float32", (len(rows), HIDDEN), memoryview(array("Q", rows)).cast("B"))
