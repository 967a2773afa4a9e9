"""Every error that LLMasOS raises on purpose, in one tree.

    LLMasOSError
    ├── UsageError                 the caller asked for something that cannot be (HTTP 400, exit code 2)
    ├── ModelError                 the model cannot be served as asked
    │   ├── UnknownModelError      nothing has that name (404)
    │   ├── UnsupportedModelError  a family or option that cannot be served, by name (400)
    │   └── CheckpointError        a file or a tensor is missing, damaged or of the wrong shape
    ├── SwarmError                 the swarm as a whole cannot help now (503)
    │   ├── SwarmUnreachableError  no bootstrap address answers
    │   └── MissingBlocksError     some blocks have no peer
    └── PeerError                  one peer could not help; another one may (502)
        ├── ConnectionLostError    the connection to it ended or could not be made
        ├── PeerTimeoutError       it did not answer within its deadline
        ├── PeerRefusedError       it is full or draining, and said so
        └── PeerFaultError         it broke the protocol, or failed inside

`UsageError` is ours, `PeerError` is the peer's: ours is never retried elsewhere, the peer's always may be.
Each error carries `message` (what happened, to whom), `hint` (the next command to type, or an empty string),
`http_status` and `retryable` (whether the same request may succeed elsewhere or later).
"""

from collections.abc import Sequence
from shlex import quote
from typing import ClassVar, Self


class LLMasOSError(Exception):
    """Base of everything that LLMasOS raises on purpose."""

    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(LLMasOSError):
    """The request itself is wrong: an argument, a prompt, an address."""

    http_status = 400


class ModelError(LLMasOSError):
    """The model cannot be served as asked."""


class UnknownModelError(ModelError):
    """No alias, directory, file or hub id has this name."""

    http_status = 404


class UnsupportedModelError(ModelError):
    """The family, or an option of it, cannot be served; the message names it and the reason."""

    http_status = 400


class CheckpointError(ModelError):
    """A file or tensor of a checkpoint is missing, damaged or of the wrong shape; the message names it."""


class SwarmError(LLMasOSError):
    """The swarm cannot help now."""

    http_status = 503
    retryable = True


class SwarmUnreachableError(SwarmError):
    """None of the given addresses answers."""


class MissingBlocksError(SwarmError):
    """Some blocks of the model have no peer.

    `missing` holds the gaps in the usual form, as in `["12:20"]`; it is `["auto"]` for a model that nobody serves, of
    which nobody says how many blocks it has. `generated` holds the text that was already there when the blocks went
    away: nothing that was produced is lost.
    """

    def __init__(self, model: str, missing: Sequence[str], *, generated: str = "", why: str = "") -> None:
        gaps = ", ".join(missing)
        lack = f"no peer serves {model}" if gaps == "auto" else f"blocks {gaps} of {model} have no peer"
        super().__init__(f"{lack} ({why})" if why else lack)
        self.model = model
        self.missing = list(missing)
        self.generated = generated
        self.hint = f"serve them: {serve_command(missing[0], model)}" if missing else ""

    def wanting(self, dtype: str | None, quantization: str | None) -> Self:
        """The same for whom only peers with these numbers help: the hint says how to start one of them."""
        if self.missing:
            command = serve_command(self.missing[0], self.model, dtype=dtype, quantization=quantization)
            self.hint = f"serve them: {command}"
        return self


class PeerError(LLMasOSError):
    """One peer could not do its part. `peer` is its id."""

    http_status = 502
    retryable = True

    def __init__(self, peer: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"peer {short_id(peer)}: {message}", hint=hint)
        self.peer = peer
        self.reason = message


class ConnectionLostError(PeerError):
    """The connection to a peer ended, or could not be made."""


class PeerTimeoutError(PeerError):
    """A peer did not answer within its deadline."""

    http_status = 504


class PeerRefusedError(PeerError):
    """A peer is full or draining. `retry_after_s` is its own estimate of when to ask again."""

    http_status = 503

    def __init__(self, peer: str, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(peer, message)
        self.retry_after_s = retry_after_s


class PeerFaultError(PeerError):
    """A peer broke the protocol or failed inside."""


def serve_command(
    blocks: str, model: str, join: str = "MULTIADDR", *, dtype: str | None = None, quantization: str | None = None
) -> str:
    """What to type to serve blocks. Strangers choose the names of models: one must not become a command by itself."""
    numbers = f" --dtype {dtype}" if dtype not in (None, "float32") else ""
    numbers += f" --quantize {quantization}" if quantization not in (None, "none") else ""
    return f"python -m llmasos.peer --blocks {blocks} --model {quote(model)}{numbers} --join {join}"


def short_id(peer: str) -> str:
    """The last eight characters of a peer id: enough to tell peers apart in a message."""
    return peer[-8:]
