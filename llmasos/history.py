"""What a session has sent along one link: rows by position, kept so that they can be sent again.

Each hop keeps its own outputs, and the client its own inputs; so when a hop dies, the one before it can bring a
replacement up to date, and no other block has to be computed again.
"""

from bisect import bisect_right
from collections.abc import Iterator

from llmasos.wire import Tensor, join_rows


class History:
    """Rows `[0, length)` in the parts in which they came. Holds what it is given: a copy only of what is left of a part
    once most of it was dropped."""

    def __init__(self) -> None:
        self.length = 0
        """The position behind the last row."""
        self._starts: list[int] = []
        self._parts: list[Tensor] = []

    def write(self, position: int, rows: Tensor) -> None:
        """Put `rows` at `position`, dropping everything from there on. Raises ValueError when that leaves a hole."""
        self.cut(position)
        if position > self.length:
            raise ValueError(f"rows at {position}, but the history ends at {self.length}")
        if rows.tokens:
            self._starts.append(position)
            self._parts.append(rows)
            self.length = position + rows.tokens

    def cut(self, length: int) -> None:
        """Drop the rows from position `length` on."""
        if length >= self.length:
            return
        keep = bisect_right(self._starts, length - 1)
        del self._starts[keep:], self._parts[keep:]
        if self._parts:
            self._parts[-1] = _shed(self._parts[-1].rows(0, length - self._starts[-1]))
        self.length = length

    def read(self, start: int, end: int) -> Tensor:
        """The rows `[start, end)`. Raises ValueError for an empty range or one that is not all there."""
        if not 0 <= start < end <= self.length:
            raise ValueError(f"rows {start}:{end} of a history of {self.length}")
        first = bisect_right(self._starts, start) - 1
        parts: list[Tensor] = []
        for begin, part in zip(self._starts[first:], self._parts[first:], strict=True):
            if begin >= end:
                break
            parts.append(part.rows(max(start - begin, 0), min(end - begin, part.tokens)))
        return join_rows(parts)

    def copy(self) -> "History":
        """The same rows, whatever becomes of the original."""
        copied = History()
        copied.length, copied._starts, copied._parts = self.length, self._starts.copy(), self._parts.copy()
        return copied

    def chunks(self, start: int, end: int, tokens: int) -> Iterator[tuple[int, Tensor]]:
        """The rows `[start, end)` in order, as (position, rows) of at most `tokens` rows each."""
        for begin in range(start, end, tokens):
            yield begin, self.read(begin, min(begin + tokens, end))


def _shed(rows: Tensor) -> Tensor:
    """The rows without the memory that they are a small part of: guesses that were wrong must not stay behind them."""
    if 2 * rows.data.nbytes >= memoryview(rows.data.obj).nbytes:
        return rows
    return Tensor(rows.dtype, rows.shape, memoryview(bytes(rows.data)), rows.codec)
