"""The Runner seam: what turns the rows of a batch into rows.

The real side is `llmasos.peer.torch_runner`; the simulated one, `sim.runner`, takes the time that the real one was
measured to take. Both pass `tests/contract/test_runner.py`. Nothing outside the two sides knows what a tensor holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from llmasos.config import DType
from llmasos.span import Span
from llmasos.wire import Tensor

BUSY_ROWS = 16
"""The batch at which a peer's throughput is stated: up to here a pass costs little more than for one row."""


class Chunk(msgspec.Struct, frozen=True):
    """Rows of one session for the blocks `span`, at the positions `[position, position + hidden.tokens)`."""

    session: str
    span: Span
    position: int
    hidden: Tensor  # (tokens, hidden)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a chunk has no result. `sender` tells whose mistake it is: the sender's input, or ours."""

    message: str
    sender: bool


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured seconds for one block: `first_row_s` for a pass of one row, `row_s` for each further row in it."""

    first_row_s: float
    row_s: float

    def throughput(self, blocks: int) -> float:
        """Rows per second through that many blocks, in passes that `BUSY_ROWS` decoding sessions share."""
        pass_s = blocks * (self.first_row_s + (BUSY_ROWS - 1) * self.row_s)
        return BUSY_ROWS / pass_s


class Runner(Protocol):
    """Runs blocks for many sessions. It owns their kv caches and nothing else."""

    @property
    def span(self) -> Span:
        """The blocks it holds."""

    @property
    def hidden_size(self) -> int:
        """Width of the rows between blocks."""

    @property
    def dtype(self) -> DType:
        """The numbers it takes and gives."""

    async def run(self, chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        """One forward pass over all chunks, at most one a session; results in the same order, of the same shapes.

        A chunk whose position lies below the session's cached length cuts the cache back to it first; one that lies
        above is the sender's fault. A fault in one chunk does not touch another, and leaves its own session at
        `position`. Never raises for what a chunk holds.
        """

    async def measure(self) -> Speed:
        """Time the blocks. Called once, before sessions come."""

    def fork(self, source: str, target: str, tokens: int) -> None:
        """Give the new session `target` the kv of the first `tokens` positions of `source`: whole pages of
        `PREFIX_PAGE_TOKENS`, all of them cached. Not while `source` is in a running pass.
        """

    def release(self, session: str) -> None:
        """Free a session's kv cache. Not while it is in a running pass. Unknown sessions are ignored."""

    async def close(self) -> None:
        """Free everything. Running passes end first."""
