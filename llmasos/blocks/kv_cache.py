"""Keys and values of sessions: who holds how many tokens, in which bytes.

A `SessionCache` belongs to one session and the range of blocks that it runs through. Its blocks hold one buffer each
for keys and values, `(heads, capacity, head_dim)`, made when the first rows arrive and grown by doubling; nothing is
reserved for tokens that never come. All tokens are kept, also by blocks that look back a short way only, because a
session may be cut back at any time. What a failed forward pass has written lies behind `length` and does not count.
"""

import torch

from llmasos.errors import UsageError
from llmasos.span import Span

PAGE_TOKENS = 64
"""Capacities are multiples of this."""


class BlockKV:
    """Keys and values of one session in one block."""

    __slots__ = ("keys", "values")

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None  # (heads, capacity, key width)
        self.values: torch.Tensor | None = None  # (heads, capacity, value width)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values) if t is not None)

    def first(self, tokens: int) -> "BlockKV":
        """A copy of the first tokens."""
        copied = BlockKV()
        copied.keys = None if self.keys is None else self.keys[:, :tokens].clone()
        copied.values = None if self.values is None else self.values[:, :tokens].clone()
        return copied

    def write(self, position: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put `(heads, tokens, width)` at `position`; returns everything up to their end, as views."""
        tokens = keys.shape[1]
        end = position + tokens
        self.keys = _with_room(self.keys, keys, position, end)
        self.values = _with_room(self.values, values, position, end)
        # Not by indexing, which takes Python three times as long: this is done for every session in every block.
        self.keys.narrow(1, position, tokens).copy_(keys)
        self.values.narrow(1, position, tokens).copy_(values)
        return self.keys.narrow(1, 0, end), self.values.narrow(1, 0, end)


def _with_room(buffer: torch.Tensor | None, rows: torch.Tensor, length: int, end: int) -> torch.Tensor:
    """`buffer` if it holds `end` tokens, else a larger one with the first `length` copied."""
    capacity = 0 if buffer is None else buffer.shape[1]
    if buffer is not None and end <= capacity:
        return buffer
    wanted = max(end, 2 * capacity)
    grown = rows.new_empty(rows.shape[0], -(-wanted // PAGE_TOKENS) * PAGE_TOKENS, rows.shape[2])
    if buffer is not None:
        grown[:, :length] = buffer[:, :length]
    return grown


class SessionCache:
    """The kv of one session. `length` tokens are in it, in every block of the range that it has run through."""

    def __init__(self, loaded: Span) -> None:
        self.loaded = loaded
        self.span: Span | None = None  # the range of its first chunk; later chunks must name the same
        self.length = 0
        self._blocks: dict[int, BlockKV] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held, unused capacity included."""
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the blocks that have any."""
        buffers = [t for block in self._blocks.values() for t in (block.keys, block.values) if t is not None]
        return sum(t.shape[0] * t.shape[2] * t.element_size() for t in buffers)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Frees the buffers when none are left."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot cut {self.length} cached tokens to {length}")
        self.length = length
        if length == 0:
            self._blocks.clear()
            self.span = None

    def fork(self, length: int) -> "SessionCache":
        """A cache of its own with the first `length` tokens, a multiple of PAGE_TOKENS. Raises UsageError."""
        self._check_fork(length)
        forked = SessionCache(self.loaded)
        forked.span, forked.length = self.span, length
        forked._blocks = {index: block.first(length) for index, block in self._blocks.items()}
        return forked

    def _check_fork(self, length: int) -> None:
        if not 0 < length <= self.length or length % PAGE_TOKENS:
            raise UsageError(f"cannot share {length} of {self.length} cached tokens: not whole pages of {PAGE_TOKENS}")

    def block(self, index: int) -> BlockKV:
        """The buffers of block `index`; made when first asked for."""
        found = self._blocks.get(index)
        if found is None:
            if self.span is None or index not in self.span:
                raise KeyError(f"block {index} is outside the blocks {self.span} of this session")
            found = self._blocks[index] = BlockKV()
        return found
