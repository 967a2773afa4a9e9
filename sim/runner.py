"""The simulated side of the Runner seam: a cost model for time, and arithmetic that notices every mistake.

A row is one number of 60 bits. Block `b` turns the row `x` at position `p` into

    y(b, p) = (A * (y(b, p - 1) + x) + B * (b + 1) + C * (p + 1)) mod 2^60

so that each output depends on every row before it, on the block and on the position: an activation that is lost,
repeated, reordered or sent to the wrong block makes a wrong number, and with it a wrong token, for ever after. The
numbers do not depend on how blocks are split over peers, nor on how rows are cut into chunks: as in the real thing.
"""

import asyncio
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmasos.config import DType
from llmasos.errors import UsageError
from llmasos.peer.runner import Chunk, Fault, Speed
from llmasos.span import Span
from llmasos.wire import Tensor

NUMBERS = 2**60
"""Rows are numbers below this."""
A, B, C = 6_364_136_223_846_793_005 % NUMBERS, 2_862_933_555_777_941_757 % NUMBERS, 3  # odd, so that no bit is lost
_LOW_BITS = NUMBERS - 1
HIDDEN = 2  # two float32: the eight bytes of a number
ROW_BYTES = 8


Row = NDArray[np.uint64]
"""A row and what some blocks make of it, in the form that `Blocks` keeps it in: (1 + blocks)."""


class Blocks:
    """The blocks of a span, one after the other in one sum.

    With z(b, p) = y(b, p) / A^(b + 1), blocks counted from the first of the span, the formula above becomes

        z(b, p) = z(b - 1, p) + A * z(b, p - 1) + (B * (b + 1) + C * (p + 1)) / A^(b + 1)

    so that a row is the running sum of what can be had of the row before it at once. To divide by A is to multiply by
    its inverse modulo 2^64, which is what numpy calculates in: the 60 bits that count are right.
    """

    def __init__(self, span: Span) -> None:
        inverse, modulus = pow(A, -1, 2**64), 2**64
        powers = [pow(inverse, count, modulus) for count in range(len(span) + 1)]
        terms = [B * (block + 1) * power for block, power in zip(span.blocks(), powers[1:], strict=True)]
        # The first place of each row is for what comes in, whatever was there in the row before.
        self._factors = np.full(len(powers), A, np.uint64)
        self._terms = np.array([0, *(term % modulus for term in terms)], np.uint64)
        self._dues = np.array([0, *(C * power % modulus for power in powers[1:])], np.uint64)
        self._added: list[Row] = []  # by position: terms and dues, the same for all sessions
        self._scale = pow(A, len(span), modulus)
        self.nothing: Row = np.zeros(len(powers), np.uint64)
        """What stands before the first row."""

    def make(self, row: int, position: int, before: Row) -> Row:
        """What the blocks make of `row`, given what they made of the row before it."""
        while position >= len(self._added):
            self._added.append(self._dues * (len(self._added) + 1) + self._terms)
        made = before * self._factors
        made += self._added[position]
        made[0] = row
        return np.add.accumulate(made, out=made)

    def last(self, made: Row) -> int:
        """The output of the last block."""
        output: int = made.item(-1) * self._scale & _LOW_BITS
        return output


blocks_of = cache(Blocks)
"""The blocks of a span, which all sessions share."""


@dataclass(slots=True)
class _Cache:
    """What one session has cached."""

    blocks: Blocks
    rows: list[Row] = field(default_factory=list)
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
        if tokens > len(cache.rows):
            raise UsageError(f"asked to share {tokens} tokens of {len(cache.rows)}")
        self._caches[target] = _Cache(cache.blocks, cache.rows[:tokens])

    def release(self, session: str) -> None:
        """See `Runner.release`."""
        self._caches.pop(session, None)

    async def close(self) -> None:
        """See `Runner.close`."""
        self._caches.clear()

    def _pass_s(self, chunks: Sequence[Chunk]) -> float:
        """Each block runs once a pass, over the rows of the sessions that use it."""
        if len({chunk.span for chunk in chunks}) == 1:
            edges = [chunks[0].span.start, chunks[0].span.end]
        else:
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
        cache = self._caches.get(chunk.session)
        if cache is None:
            cache = self._caches[chunk.session] = _Cache(blocks_of(chunk.span))
        blocks, cached = cache.blocks, cache.rows
        if chunk.position > len(cached):
            return Fault(f"rows at position {chunk.position}, but {len(cached)} are cached", sender=True)
        rows = to_numbers(hidden)
        if max(rows, default=0) >= NUMBERS:
            return Fault("the activations hold numbers that are none", sender=True)
        del cached[chunk.position :]
        made = cached[-1] if cached else blocks.nothing
        outputs: list[int] = []
        for row in rows:
            made = blocks.make(row, len(cached), made)
            cached.append(made)
            outputs.append(blocks.last(made))
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
        self._last = self._blocks.nothing

    def feed(self, rows: Sequence[int]) -> int:
        """The output of the last block for the last of `rows`."""
        for row in rows:
            self._last = self._blocks.make(row, self.length, self._last)
            self.length += 1
        return self._blocks.last(self._last) if rows else 0


def to_numbers(tensor: Tensor) -> list[int]:
    """The numbers in a tensor of the simulator."""
    return list(struct.unpack(f"<{len(tensor.data) // ROW_BYTES}Q", tensor.data))


def from_numbers(rows: Sequence[int]) -> Tensor:
    """Numbers as a tensor of (rows, HIDDEN)."""
    return Tensor("float32", (len(rows), HIDDEN), memoryview(struct.pack(f"<{len(rows)}Q", *rows)))
