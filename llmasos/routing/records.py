"""What a peer announces about itself. Bytes of a stranger become a `PeerRecord` here, or a `RecordError`.

A record that exists is valid: every bound below is checked at birth, by whoever makes one. So a peer cannot announce
what others would refuse, and nothing behind this file divides by a zero or meets a NaN. What a record cannot show is
whether its claims are *true*: `cost.py` decides how far they are believed.

On the wire it is compact JSON. Unknown fields are ignored, so that a newer peer may say more than we understand.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, NoReturn, TypeVar, get_args

from llmasos.config import MAX_RECORD_BYTES, DType
from llmasos.errors import UsageError
from llmasos.span import Span

MAX_MODEL_BLOCKS = 1_024
"""Blocks of one model; the deepest published decoder has 126 (Llama 3.1 405B)."""
MAX_ADDRESSES = 16
"""As many as `wire.Contact` takes."""
MAX_ADDRESS_CHARS = 256
MAX_ID_CHARS = 128
"""Peer ids (52 characters), model names and digests (64 hex digits and a prefix)."""
MAX_NAME_CHARS = 64
MAX_VERSION_CHARS = 32
MIN_BLOCK_SECONDS = 1e-6
"""Seconds of one block for one row: launching a single GPU kernel takes 2 - 5 us, and a block is at least one."""
MAX_BLOCK_SECONDS = 60.0
"""A block of the largest models (6 GB in bfloat16) read from a slow disk (100 MB/s) for every row."""
MIN_ROW_SECONDS = 1e-9
"""Seconds of one block for each further row: the smallest models need 7 MFLOP a row, the fastest GPUs do 1e15 a
second. Also the floor for a probe whose marginal cost is lost in its noise."""
MAX_ROWS_PER_S = 1e9
"""The same bound for a whole span: the fastest row that there can be."""
MAX_SESSIONS = 1_000_000
MAX_TOKENS = 2**31
"""As `wire.Count`."""
MAX_INCARNATION = 2**63 - 1
"""Nanoseconds since the epoch fit until the year 2262."""
MAX_PARSED = 4_096
"""Records kept as they were parsed, 2 kB each: most of a look-up is what the one before it found."""
MAX_CLOCK_SKEW_S = 10.0
"""How far in our future a record may have been made: NTP keeps hosts within 0.1 s, forgotten ones drift seconds."""

DTYPES: tuple[DType, ...] = get_args(DType)
"""What blocks can compute in."""

_WORD = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")


class RecordError(ValueError):
    """A record that cannot be believed. `field` names what is wrong with it; empty for the record as a whole."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"record field {field!r} {problem}" if field else f"the record {problem}")
        self.field = field


class ClockError(RecordError):
    """A record from the future: its peer's clock is ahead of ours by `ahead_s`, or ours is behind."""

    def __init__(self, ahead_s: float) -> None:
        super().__init__("announced_at", f"lies {ahead_s:.0f} s in the future")
        self.ahead_s = ahead_s


class PeerState(StrEnum):
    """The life of a peer. Only `ONLINE` takes new sessions; `DRAINING` finishes those that it has."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """One peer's announcement for one model.

    `incarnation` is the peer's start time (ns since the epoch): a restarted peer outranks its former self.
    `announced_at` is seconds of network time. `block_seconds` is the measured time of one block for one decoding
    row, `row_seconds` what each further row of the same pass adds to it, `throughput` the rows per second through
    the whole span at a useful batch. `kv_free_tokens` is room not reserved by any session.
    """

    peer: str
    name: str = ""
    model: str
    digest: str
    model_blocks: int
    span: Span
    state: PeerState
    incarnation: int
    announced_at: float
    addresses: tuple[str, ...] = ()
    dtype: str
    quantization: str = "none"
    version: str
    block_seconds: float
    row_seconds: float
    throughput: float
    active_sessions: int = 0
    queued_tokens: int = 0
    kv_free_tokens: int
    kv_total_tokens: int

    def __post_init__(self) -> None:
        _check_text("peer", self.peer, 1, MAX_ID_CHARS)
        _check_text("name", self.name, 0, MAX_NAME_CHARS)
        _check_text("model", self.model, 1, MAX_ID_CHARS)
        _check_text("digest", self.digest, 1, MAX_ID_CHARS)
        _check_text("version", self.version, 1, MAX_VERSION_CHARS)
        _check_whole("model_blocks", self.model_blocks, 1, MAX_MODEL_BLOCKS)
        if self.span.end > self.model_blocks:
            raise RecordError("span", f"{self.span} reaches beyond the {self.model_blocks} blocks of the model")
        _check_whole("incarnation", self.incarnation, 0, MAX_INCARNATION)
        _check_number("announced_at", self.announced_at, 0.0, float(MAX_INCARNATION))
        if len(self.addresses) > MAX_ADDRESSES:
            raise RecordError("addresses", f"are {len(self.addresses)}, more than {MAX_ADDRESSES}")
        for address in self.addresses:
            _check_text("addresses", address, 1, MAX_ADDRESS_CHARS)
        if self.dtype not in DTYPES:
            raise RecordError("dtype", f"is none of {', '.join(DTYPES)}")
        if not _WORD.fullmatch(self.quantization):
            raise RecordError("quantization", "is not a short lower-case word")
        _check_number("block_seconds", self.block_seconds, MIN_BLOCK_SECONDS, MAX_BLOCK_SECONDS)
        _check_number("row_seconds", self.row_seconds, MIN_ROW_SECONDS, MAX_BLOCK_SECONDS)
        _check_number("throughput", self.throughput, 1 / (MAX_BLOCK_SECONDS * MAX_MODEL_BLOCKS), MAX_ROWS_PER_S)
        _check_whole("active_sessions", self.active_sessions, 0, MAX_SESSIONS)
        _check_whole("queued_tokens", self.queued_tokens, 0, MAX_TOKENS)
        _check_whole("kv_total_tokens", self.kv_total_tokens, 0, MAX_TOKENS)
        _check_whole("kv_free_tokens", self.kv_free_tokens, 0, self.kv_total_tokens)

    @property
    def kv_load(self) -> float:
        """The share of the kv room that sessions have reserved, 0 to 1."""
        return 1.0 - self.kv_free_tokens / self.kv_total_tokens if self.kv_total_tokens else 1.0

    @property
    def queue_seconds(self) -> float:
        """The time that the rows already waiting will take: each further row of a pass costs `row_seconds` a block."""
        return self.queued_tokens * self.row_seconds * len(self.span)

    @property
    def load(self) -> float:
        """How full the peer is, 0 to 1, for people: its kv room or one second of queued work, whichever is fuller."""
        return max(self.kv_load, min(1.0, self.queue_seconds))

    @property
    def relayed(self) -> bool:
        """Whether every address that it announces leads through a relay."""
        return bool(self.addresses) and all("/p2p-circuit" in address for address in self.addresses)

    def age(self, now: float) -> float:
        """Seconds since the record was made; zero for one from a clock slightly ahead of ours."""
        return max(0.0, now - self.announced_at)

    @property
    def recency(self) -> tuple[int, float]:
        """Of two records of one peer and model the one with the greater pair is the newer."""
        return (self.incarnation, self.announced_at)

    def to_bytes(self) -> bytes:
        """What is published. Raises RecordError when it would be larger than others accept."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        fields["span"] = str(self.span)
        data = _ENCODER.encode(fields).encode()
        if len(data) > MAX_RECORD_BYTES:
            raise RecordError("", f"has {len(data)} bytes, more than {MAX_RECORD_BYTES}: announce fewer addresses")
        return data

    @classmethod
    def from_bytes(cls, data: bytes, *, peer: str, now: float) -> "PeerRecord":
        """Parse what `peer` (authenticated) has published. Raises RecordError, never anything else."""
        record = _parse(data)
        if record.peer != peer:
            raise RecordError("peer", f"is not {peer}, who has signed it")
        if record.announced_at > now + MAX_CLOCK_SKEW_S:
            raise ClockError(record.announced_at - now)
        return record


@lru_cache(maxsize=MAX_PARSED)
def _parse(data: bytes) -> PeerRecord:
    fields = _parse_object(data)
    return PeerRecord(
        peer=_take(fields, "peer", str),
        name=_take(fields, "name", str, ""),
        model=_take(fields, "model", str),
        digest=_take(fields, "digest", str),
        model_blocks=_take(fields, "model_blocks", int),
        span=_take_span(fields),
        state=_take_state(fields),
        incarnation=_take(fields, "incarnation", int),
        announced_at=_take_float(fields, "announced_at"),
        addresses=_take_addresses(fields),
        dtype=_take(fields, "dtype", str),
        quantization=_take(fields, "quantization", str, "none"),
        version=_take(fields, "version", str),
        block_seconds=_take_float(fields, "block_seconds"),
        row_seconds=_take_float(fields, "row_seconds"),
        throughput=_take_float(fields, "throughput"),
        active_sessions=_take(fields, "active_sessions", int, 0),
        queued_tokens=_take(fields, "queued_tokens", int, 0),
        kv_free_tokens=_take(fields, "kv_free_tokens", int),
        kv_total_tokens=_take(fields, "kv_total_tokens", int),
    )


_FIELDS = tuple(PeerRecord.__slots__)
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


# --- one field at a time ---------------------------------------------------------------------------------------------


def _check_text(field: str, value: str, shortest: int, longest: int) -> None:
    # isprintable() also refuses line breaks, escapes, lone surrogates and marks that reverse the text around them
    if not shortest <= len(value) <= longest:
        raise RecordError(field, f"has {len(value)} characters, not {shortest} to {longest}")
    if not value.isprintable():
        raise RecordError(field, "holds characters that cannot be printed")


def _check_number(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN fails every comparison
        raise RecordError(field, f"is {value!r}, not within {least:g} to {most:g}")


def _check_whole(field: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise RecordError(field, f"is out of the range {least} to {most}")


def _parse_object(data: bytes) -> Mapping[str, Any]:
    if len(data) > MAX_RECORD_BYTES:
        raise RecordError("", f"has {len(data)} bytes, more than {MAX_RECORD_BYTES}")
    try:
        fields = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, 4,300 digits, a thousand brackets
        raise RecordError("", "is not JSON") from error
    if not isinstance(fields, dict):
        raise RecordError("", "is not a JSON object")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise RecordError("", f"holds {name}, which is no number")


_MISSING: Any = object()
_T = TypeVar("_T")


def _take(fields: Mapping[str, Any], field: str, kind: type[_T], default: _T = _MISSING) -> _T:
    value = fields.get(field, default)
    if value is _MISSING:
        raise RecordError(field, "is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecordError(field, f"is not {'text' if kind is str else 'a whole number'}")
    return value


def _take_float(fields: Mapping[str, Any], field: str) -> float:
    value = fields.get(field, _MISSING)
    if value is _MISSING:
        raise RecordError(field, "is missing")
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RecordError(field, "is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecordError(field, "is not finite")
    return number


def _take_span(fields: Mapping[str, Any]) -> Span:
    try:
        return Span.parse(_take(fields, "span", str))
    except UsageError as error:
        raise RecordError("span", "is not START:END with START < END") from error


def _take_state(fields: Mapping[str, Any]) -> PeerState:
    try:
        return PeerState(_take(fields, "state", str))
    except ValueError as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("state", f"is none of {', '.join(PeerState)}") from error


def _take_addresses(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("addresses", [])
    if not isinstance(value, list) or not all(isinstance(address, str) for address in value):
        raise RecordError("addresses", "are not a list of texts")
    return tuple(value)
