"""The simulated side of the Runner seam: a cost model for time, and arithmetic that notices every mistake.

A row is one number of 60 bits. Block `b` turns the row `x` at position `p` into

    y(b, p) = (A * (y(b, p - 1) + x) + B * (b + 1) + C * (p + 1)) mod 2^60

so that each output depends on every row before it, on the block and on the position: an activation that is lost,
repeated, reordered or sent to the wrong block makes a wrong number, and with it a wrong token, for ever after. The
numbers do not depend on how blocks are split over peers, nor on how rows are cut into chunks: as in the real thing.
"""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llmasos.config import DType
from llmasos.peer.runner import Chunk, Fault, Speed
from llmasos.span import Span
from llmasos.wire import Tensor

NUMBERS = 2**60
"""Rows are numbers below this."""
A, B, C = 6_364_136_223_846_793_005 % NUMBERS, 2_862_933_555_777_941_757 % NUMBERS, 3  # odd, so that no bit is lost
_LOW_BITS = NUMBERS - 1  # a power of two: to cut off bits is three times as fast as to divide
HIDDEN = 2  # two float32: the eight bytes of a number
ROW_BYTES = 8


@dataclass(slots=True)
class _Cache:
    """What one session has cached."""

    terms: list[int]
    """`B * (b + 1)` of each block."""
    outputs: "list[array[int]]" = field(default_factory=list)
    """By position: what each block made there."""


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
        self._caches[target] = _Cache(cache.terms, cache.outputs[:tokens])

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
        cache = self._caches.get(chunk.session)
        if cache is None:
            cache = self._caches[chunk.session] = _Cache(terms_of(chunk.span))
        outputs = cache.outputs
        if chunk.position > len(outputs):
            return Fault(f"rows at position {chunk.position}, but {len(outputs)} are cached", sender=True)
        rows = to_numbers(hidden)
        if any(row >= NUMBERS for row in rows):
            return Fault("the activations hold numbers that are none", sender=True)
        del outputs[chunk.position :]
        before: Sequence[int] = outputs[-1] if outputs else [0] * len(cache.terms)
        for row in rows:
            made = run_row(before, cache.terms, row, len(outputs))
            outputs.append(array("Q", made))
            before = made
        return from_numbers([made[-1] for made in outputs[chunk.position :]])


def run_row(before: Sequence[int], terms: Sequence[int], row: int, position: int) -> list[int]:
    """What each of some blocks makes of `row`, given what it made of the row `before` this one."""
    due = C * (position + 1)
    made = []
    for last, term in zip(before, terms, strict=True):
        row = (A * (last + row) + term + due) & _LOW_BITS
        made.append(row)
    return made


def terms_of(span: Span) -> list[int]:
    """What the blocks of a span add to each row."""
    return [B * (block + 1) for block in span.blocks()]


def reference(blocks: int, rows: Sequence[int]) -> list[int]:
    """What a single machine makes of `rows`, with no cache and no network."""
    machine = Reference(blocks)
    return [machine.feed([row]) for row in rows]


class Reference:
    """A single machine that takes rows as they come: what each answer of a swarm has to be."""

    def __init__(self, blocks: int) -> None:
        self.length = 0
        self._terms = terms_of(Span(0, blocks))
        self._last = [0] * blocks  # the output of each block at the position before

    def feed(self, rows: Sequence[int]) -> int:
        """The output of the last block for the last of `rows`."""
        for row in rows:
            self._last = run_row(self._last, self._terms, row, self.length)
            self.length += 1
        return self._last[-1] if rows else 0


def to_numbers(tensor: Tensor) -> list[int]:
    """The numbers in a tensor of the simulator."""
    data = bytes(tensor.data)
    return [int.from_bytes(data[at : at + ROW_BYTES], "little") for at in range(0, len(data), ROW_BYTES)]


def from_numbers(rows: Sequence[int]) -> Tensor:
    """Numbers as a tensor of (rows, HIDDEN)."""
    data = b"".join(row.to_bytes(ROW_BYTES, "little") for row in rows)
    return Tensor("float32", (len(rows), HIDDEN), memoryview(data))
