"""What happens to a session beside its text: told to whoever asked for it, as it happens."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """Blocks are lost, and nobody has them yet. Told about once a second while that lasts."""

    model: str
    missing: tuple[str, ...]
    waited_s: float
    left_s: float

    def __str__(self) -> str:
        blocks = ", ".join(self.missing)
        return f"blocks {blocks} of {self.model} have no peer: waiting for one, {self.left_s:.0f} s more"


@dataclass(frozen=True, slots=True)
class Rerouted:
    """Peers were lost, and others have taken their places."""

    lost: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"rerouted: {self.why}"


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A peer that is about to stop was left for another one."""

    peer: str

    def __str__(self) -> str:
        return f"left peer {self.peer[-8:]}, which is about to stop"


Event = Waiting | Rerouted | HandedOver
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Nobody asked."""
