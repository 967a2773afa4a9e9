"""A half-open range of blocks, written `0:12`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llmasos.errors import UsageError

_FORM = re.compile(r"(\d{1,6}):(\d{1,6})")


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """Blocks `start`, `start + 1`, … `end - 1` of a model. Never empty, never negative."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise UsageError(
                f"blocks {self.start}:{self.end} is not a range: the end must lie behind the start",
                hint="ranges are half-open: --blocks 0:12 serves the blocks 0 to 11",
            )

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read the written form. Raises UsageError for anything but `START:END`."""
        match = _FORM.fullmatch(text.strip())
        if not match:
            raise UsageError(f"{text!r} is not a range of blocks", hint="write it as START:END, as in --blocks 0:12")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, other: "int | Span") -> bool:
        if isinstance(other, Span):
            return self.start <= other.start and other.end <= self.end
        return self.start <= other < self.end

    def blocks(self) -> range:
        """The block numbers, in order."""
        return range(self.start, self.end)


def gaps(spans: Iterable[Span], blocks: int) -> list[Span]:
    """The maximal ranges of `0:blocks` that no span covers, in order."""
    found: list[Span] = []
    reached = 0
    for span in sorted(spans):
        if span.start > reached:
            found.append(Span(reached, min(span.start, blocks)))
        reached = max(reached, span.end)
        if reached >= blocks:
            return found
    found.append(Span(reached, blocks))
    return found
