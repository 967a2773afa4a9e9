"""Where along a session's route its rows travel packed: at which boundaries between blocks.

A codec that rounds makes the numbers of a session depend on its route. So the boundaries at which rows are packed are
those of the first route, and stay so whatever becomes of its hops: a failover that cuts a span in two sends plain rows
in between, and one that would leave a packed boundary out is planned around it. With that, and since a row is packed
alike in whatever company it travels (`llmasos/codec.py`), the text goes on as it would have.

What peers may hold of a prompt from earlier sessions depends on these boundaries too, and so do the names that it is
asked for by.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import get_args

from llmasos.config import Codec
from llmasos.errors import UsageError
from llmasos.routing.planner import Hop
from llmasos.span import Span


class Packing:
    """Of one session: which of its rows are packed. The way back from the last block never is."""

    def __init__(self, codec: Codec) -> None:
        if codec not in get_args(Codec):
            raise UsageError(f"there is no codec {codec!r}", hint=f"there are {', '.join(get_args(Codec))}")
        self.unable: frozenset[str] = frozenset()
        """Peers that have been found not to know the codec."""
        self._codec = codec
        self._boundaries: frozenset[int] = frozenset()

    @property
    def wanted(self) -> bool:
        """Whether rows are to be packed anywhere."""
        return self._codec != "exact"

    def codec(self, boundary: int) -> Codec:
        """How the rows are packed that go into block `boundary`."""
        return self._codec if boundary in self._boundaries else "exact"

    def choose(self, route: Sequence[Hop]) -> None:
        """Pack wherever both sides can. Only before the first row."""
        able = [hop.peer not in self.unable for hop in route]
        inner = [
            after.span.start for (_, after), ends in zip(pairwise(route), pairwise(able), strict=True) if all(ends)
        ]
        first = [route[0].span.start] if able[0] else []
        self._boundaries = frozenset(first + inner if self.wanted else [])

    def suits(self, hop: Hop, codecs: Iterable[str]) -> bool:
        """Whether a peer that knows these codecs can take a place in the route; one that cannot is remembered."""
        able = self._codec in codecs or self._boundaries.isdisjoint((hop.span.start, hop.span.end))
        if not able:
            self.unable |= {hop.peer}
        return able

    def split(self, missing: Iterable[Span]) -> list[Span]:
        """The same blocks, cut wherever rows are packed."""
        parts: list[Span] = []
        for span in missing:
            cuts = sorted(boundary for boundary in self._boundaries if span.start < boundary < span.end)
            parts += [Span(start, end) for start, end in pairwise([span.start, *cuts, span.end])]
        return parts

    def names(self, prefix: Iterable[bytes]) -> tuple[bytes, ...]:
        """What the pages `prefix` are called where rows are packed like this."""
        if not self._boundaries:
            return tuple(prefix)
        how = f"{self._codec} {sorted(self._boundaries)}".encode()
        return tuple(blake2b(how, key=name, digest_size=16).digest() for name in prefix)
