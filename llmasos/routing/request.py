"""What a client wants to have computed: which blocks of which weights, how much, and through whom not."""

from dataclasses import dataclass

from llmasos.errors import UsageError
from llmasos.routing.cost import DEFAULT_ROW_BYTES, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """The blocks `[start, end)` of a checkpoint, for one session.

    `end` None means all of `model_blocks`, and that None means as many as the swarm announces for the digest.
    `dtype` and `quantization` None leave the choice of numerics open; one route still uses a single kind of them
    unless `mixed` allows otherwise. `kv_tokens` is the room that each hop must have. `pin` names the only peers that
    may serve; what a user pins is tried even if it has failed before.
    """

    model: str
    digest: str
    model_blocks: int | None = None
    start: int = 0
    end: int | None = None
    prompt_tokens: int = 1
    new_tokens: int = 64
    kv_tokens: int = 0
    row_bytes: int = DEFAULT_ROW_BYTES
    dtype: str | None = None
    quantization: str | None = None
    mixed: bool = False
    exclude: frozenset[str] = frozenset()
    pin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        last = self.model_blocks if self.end is None else self.end
        if self.start < 0 or (last is not None and last <= self.start):
            raise UsageError(f"there are no blocks from {self.start} to {last}")
        if self.model_blocks is not None and self.end is not None and self.end > self.model_blocks:
            raise UsageError(f"{self.model} has {self.model_blocks} blocks; block {self.end - 1} is not one of them")
        if min(self.prompt_tokens, self.new_tokens, self.kv_tokens) < 0 or self.row_bytes <= 0:
            raise UsageError("tokens and bytes of a request cannot be negative")

    @property
    def work(self) -> Work:
        return Work(self.prompt_tokens, self.new_tokens, self.row_bytes)

    def allows(self, dtype: str, quantization: str) -> bool:
        """Whether these numerics are among those asked for."""
        return self.dtype in (None, dtype) and self.quantization in (None, quantization)
