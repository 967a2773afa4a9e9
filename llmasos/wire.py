"""Messages <-> bytes. No I/O here, and nothing but bounds is decided.

A frame is one version byte and one MessagePack map; its `type` says which message it is. Tensors travel as raw
little-endian bytes inside it and are decoded without a copy. What arrives is checked once, here: unknown types,
missing or ill-typed fields, absurd sizes and tensors whose bytes do not match their shape raise `FrameError`.
Unknown fields are ignored, so that a newer peer may say more than an older one understands.

Who says what, on the stream that a client opens to each hop of its route:

    client                          peer
      Open   ──────────────────────▶        admit a session on some of its blocks
             ◀──────────────────────  Opened | Failed
      Step   ──────────────────────▶        activations for positions [position, position + tokens)
             ◀──────────────────────  Result | Failed     from the last hop, or from every hop that relays
      Reroute ─────────────────────▶        its neighbours have changed
      Replay ──────────────────────▶        send the next hop again what you produced
      Ping   ──────────────────────▶        keeps the lease of an idle session
             ◀──────────────────────  Pong
             ◀──────────────────────  Draining          "I am about to go: find somebody else"
      Close  ──────────────────────▶        end of the session; so is the end of the stream

and on the stream that a hop opens to the next one:

      Attach ──────────────────────▶        "what follows belongs to that session"
      Step   ──────────────────────▶        failures are told to the client, on its own stream
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from llmasos.config import (
    INT8_BLOCK,
    MAX_FRAME_BYTES,
    MAX_HIDDEN,
    MAX_PREFIX_PAGES,
    MAX_STEP_TOKENS,
    Codec,
    DType,
)

VERSION = 1
PROTOCOL = f"llmasos/{VERSION}"

MAX_MESSAGE_CHARS = 500
"""Longest explanation in a `Failed`; what says it is cut to this."""

ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

MAX_COUNT = 2**31
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Index = Annotated[int, msgspec.Meta(ge=0, le=2**20)]
Id = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_CHARS)]
Rows = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP_TOKENS)]
Width = Annotated[int, msgspec.Meta(ge=1, le=MAX_HIDDEN)]
PrefixKey = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Address = Annotated[str, msgspec.Meta(max_length=256)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Spent = tuple[Count, Count]
"""Microseconds that a step waited on one hop, and that the passes took which computed it there."""
MAX_TRAIL = 4_096
"""Hops: more than the largest model has blocks."""
Trail = Annotated[tuple[Spent, ...], msgspec.Meta(max_length=MAX_TRAIL)] | msgspec.UnsetType
"""What each hop has spent on a step so far, in their order. Not on the wire unless the session is traced."""


class FrameError(ValueError):
    """The bytes are not a message of this protocol."""


def row_bytes(hidden: int, dtype: DType, codec: Codec = "exact") -> int:
    """What a row of `hidden` numbers weighs."""
    if codec == "exact":
        return hidden * ITEM_BYTES[dtype]
    return 2 * hidden if codec == "bfloat16" else hidden + 4 * -(-hidden // INT8_BLOCK)


class Tensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """Activations of `(tokens, hidden)`, row-major, little-endian: numbers of `dtype`, packed as `codec` says."""

    dtype: DType
    shape: tuple[Rows, Width]
    data: memoryview
    codec: Codec = "exact"

    def __post_init__(self) -> None:
        tokens, hidden = self.shape
        expected = tokens * row_bytes(hidden, self.dtype, self.codec)
        if self.data.nbytes != expected:
            kind = self.dtype if self.codec == "exact" else f"{self.codec}-packed {self.dtype}"
            raise ValueError(f"a {kind} tensor of {self.shape} has {expected} bytes, not {self.data.nbytes}")

    @property
    def tokens(self) -> int:
        return self.shape[0]

    @property
    def hidden(self) -> int:
        return self.shape[1]

    def rows(self, start: int, end: int) -> "Tensor":
        """The rows `[start, end)`, as a view."""
        if start == 0 and end == self.tokens:
            return self
        each = row_bytes(self.hidden, self.dtype, self.codec)
        return Tensor(self.dtype, (end - start, self.hidden), self.data[start * each : end * each], self.codec)


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, one after the other; a single part is returned as it is. They must be alike."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    data = b"".join(part.data for part in parts)
    return Tensor(first.dtype, (sum(part.tokens for part in parts), first.hidden), memoryview(data), first.codec)


class Contact(msgspec.Struct, frozen=True):
    """A peer and where to find it: its multiaddrs without the trailing peer id."""

    peer: Id
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)] = ()


class NextHop(msgspec.Struct, frozen=True):
    """Where a hop sends its output: a peer, and the name of the session there."""

    contact: Contact
    session: Id


class Message(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """Base of all messages; `type` on the wire is the class name in lower case."""


class Open(Message, frozen=True, tag="open"):
    """Admit session `session` on the blocks `start:end` of the checkpoint `digest`.

    `tokens` is what the session expects to hold at most; the peer reserves room for it. Steps arrive on this
    stream, or on one that the peer `upstream` attaches. Output goes to `downstream`; where that is None it comes back
    on this stream: the last `keep` rows, or all of them when the client is to `relay` them to the next hop itself.
    `prefix` names the pages that its prompt begins with, each by a key for all tokens up to its end.
    With `trace`, steps and results tell what each hop has spent on them.
    The rows that the hop sends are packed by `codec`, those that it takes as they say themselves.
    """

    session: Id
    digest: Id
    dtype: DType
    start: Index
    end: Index
    tokens: Count
    upstream: Id | None = None
    downstream: NextHop | None = None
    relay: bool = False
    trace: bool = False
    prefix: Annotated[tuple[PrefixKey, ...], msgspec.Meta(max_length=MAX_PREFIX_PAGES)] = ()
    codec: Codec = "exact"


class Opened(Message, frozen=True, tag="opened"):
    """The session is admitted. `kv_free_tokens` is the room left after it.

    The first `prefix_tokens` positions are cached already, and have been passed on in an earlier session: whole pages
    of those that were named. `codecs` are those that the peer reads and writes beside plain rows.
    """

    kv_free_tokens: Count
    prefix_tokens: Count = 0
    codecs: Annotated[tuple[Id, ...], msgspec.Meta(max_length=16)] = ()


class Attach(Message, frozen=True, tag="attach"):
    """The frames that follow on this stream are steps of `session`, sent by its previous hop."""

    session: Id


class Step(Message, frozen=True, tag="step"):
    """Activations for the positions `[position, position + tokens)` of a session.

    `step` numbers the steps of a session from zero; the same number again gets the same answer, and is not computed.
    `keep` is how many trailing rows the client wants back from the last hop: 1 while decoding, 0 for an inner chunk
    of a prompt.
    A position below the length of the kv cache first cuts the cache back to it. `replay` counts the hops, from this
    one on, that compute the step in order to catch up: the last of them answers the client and sends nothing on.
    """

    step: Count
    position: Count
    keep: Count
    hidden: Tensor
    replay: Count = 0
    spent: Trail = msgspec.UNSET


class Result(Message, frozen=True, tag="result"):
    """What a route made of step `step`: the last `keep` rows after the final block."""

    step: Count
    hidden: Tensor
    spent: Trail = msgspec.UNSET


class Reroute(Message, frozen=True, tag="reroute"):
    """From now on steps come from `upstream` (or the client) and output goes as `Open` says. Answered by nothing.

    Steps that were under way are dropped: the client sends them anew. A `Ping` behind it tells when it has been heard.
    """

    upstream: Id | None = None
    downstream: NextHop | None = None
    relay: bool = False


class Replay(Message, frozen=True, tag="replay"):
    """Send downstream, as steps `step`, `step + 1`, … of `chunk` rows each, the rows `[0, until)` that you produced."""

    step: Count
    until: Count
    chunk: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEP_TOKENS)]
    hops: Count


ErrorCode = Literal["bad_request", "unsupported", "refused", "fault", "next_hop_lost", "unknown_session"]


class Failed(Message, frozen=True, tag="failed"):
    """The peer cannot do what was asked.

    `bad_request` is the sender's mistake; `refused` means full or draining, try elsewhere or after
    `retry_after_s`; `next_hop_lost` names in `peer` the hop that could not be reached; `fault` is our own.
    """

    code: ErrorCode
    message: Text
    step: Count | None = None
    peer: Id | None = None
    retry_after_s: Seconds = 0.0


class Ping(Message, frozen=True, tag="ping"):
    """Keeps a lease, or measures a round trip. `padding` makes it as large as what is to be measured."""

    nonce: Count = 0
    padding: bytes = b""


class Pong(Message, frozen=True, tag="pong"):
    """Answers a Ping with what it carried.

    On the stream of a session it also tells how far its steps have come: the last one that was accepted, the last one
    that was passed on to the next hop as the route stands, and the rows that wait. So the client finds the link that a
    step is lost on when every hop is well.

    A stranger that asks how far the peer is hears how busy it is: its `sessions`, their rows that wait, its free room.
    """

    nonce: Count = 0
    padding: bytes = b""
    accepted: Count | None = None
    passed: Count | None = None
    queued: Count = 0
    sessions: Count | None = None
    kv_free_tokens: Count | None = None


class Draining(Message, frozen=True, tag="draining"):
    """The peer is about to stop. The session goes on; the client should move it elsewhere, and close it here."""


class Close(Message, frozen=True, tag="close"):
    """The session ends; its kv is free at once."""


AnyMessage = Open | Opened | Attach | Step | Result | Reroute | Replay | Failed | Ping | Pong | Draining | Close

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)
_VERSION_BYTE = bytes([VERSION])


def encode(message: AnyMessage) -> bytes:
    """One frame. Raises FrameError when it would be larger than any peer accepts."""
    frame = _VERSION_BYTE + _encoder.encode(message)
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return frame


def decode(frame: bytes) -> AnyMessage:
    """The message in a frame; its tensors view the frame's memory. Raises FrameError, never anything else."""
    if not frame or frame[0] != VERSION:
        raise FrameError(f"not a frame of version {VERSION}: it begins with {frame[:1].hex() or 'nothing'}")
    try:
        return _decoder.decode(memoryview(frame)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"not a message: {error}") from error
