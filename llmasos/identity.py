"""Who a process is: an Ed25519 key, the peer id that names it, and signatures that anybody who knows the id can check.

Files and ids are those of libp2p. A key file is a protobuf, `08 01 12 40` + seed + public key. A peer id
(`12D3Koo…`) is the base58 of an identity multihash around the protobuf of the public key: it *contains* the key,
so a signature needs nothing but the id to be verified.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from llmasos.errors import UsageError
from llmasos.network import PeerId

KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_PEER_ID_CHARS = 80
"""Ids of Ed25519 keys have 52 characters; longer texts are not worth decoding."""

_PRIVATE_PREFIX = bytes.fromhex("08011240")
_RSA_PREFIX = bytes.fromhex("0800")
_ID_PREFIX = bytes.fromhex("002408011220")  # identity multihash of 36 bytes; protobuf of an Ed25519 public key
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {character: digit for digit, character in enumerate(_ALPHABET)}


class Identity:
    """A private key and the peer id that names it."""

    def __init__(self, seed: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self._seed = seed
        self._public = self._private.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self._public)

    def __repr__(self) -> str:  # never the key
        return f"Identity({self.peer_id})"

    @classmethod
    def generate(cls) -> "Identity":
        """A new identity that is nowhere stored."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """The identity in a key file. Raises UsageError naming the file when it holds none."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"the identity file {path} cannot be read: {error.strerror}",
                hint=f"check its owner and mode: ls -l {path}",
            ) from error
        seed = data[len(_PRIVATE_PREFIX) : len(_PRIVATE_PREFIX) + KEY_BYTES]
        if len(data) == len(_PRIVATE_PREFIX) + 2 * KEY_BYTES and data.startswith(_PRIVATE_PREFIX):
            identity = cls(seed)
            if identity.key_file() == data:
                return identity
        reason = "holds an RSA key" if data.startswith(_RSA_PREFIX) else "is damaged"
        raise UsageError(
            f"the identity file {path} {reason}: LLMasOS needs a libp2p Ed25519 key",
            hint=f"move it away and a new one is made (with a new peer id): mv {path} {path}.old",
        )

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """The identity in a key file, made first (mode 0600, its directories too) where there is none."""
        if not path.exists():
            identity = cls.generate()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                identity.save(path)
            except FileExistsError:
                return cls.load(path)  # another process made it between our look and our link
            except OSError as error:
                raise UsageError(
                    f"the identity file {path} cannot be made: {error.strerror}",
                    hint="name another one with --identity FILE",
                ) from error
            return identity
        return cls.load(path)

    def save(self, path: Path) -> None:
        """Write the key file, whole or not at all, readable by its owner only. Raises FileExistsError."""
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(self.key_file())
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # unlike a rename, this never replaces another process's key
        finally:
            draft.unlink(missing_ok=True)

    def key_file(self) -> bytes:
        """The contents of a libp2p key file. Secret."""
        return _PRIVATE_PREFIX + self._seed + self._public

    def sign(self, message: bytes) -> bytes:
        """64 bytes that `verify` accepts for this peer id and this message only."""
        return self._private.sign(message)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold an identity file for this process alone: two peers of one id would take each other's connections."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"the identity {path} is in use by another process",
                hint="stop that one, or give this one an identity of its own: --identity FILE",
            ) from None
        yield


def verify(peer: str, message: bytes, signature: bytes) -> bool:
    """Whether the holder of `peer`'s key signed `message`. False for an id that contains no key, too."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key_of(peer)).verify(signature, message)
    except (ValueError, InvalidSignature):
        return False
    return True


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id that contains this Ed25519 public key."""
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(base58_encode(_ID_PREFIX + public_key))


@lru_cache(maxsize=4096)
def public_key_of(peer: str) -> bytes:
    """The Ed25519 public key inside a peer id. Raises ValueError for any other text."""
    data = base58_decode(peer)
    if len(data) != len(_ID_PREFIX) + KEY_BYTES or not data.startswith(_ID_PREFIX):
        raise ValueError(f"{peer!r} is not the peer id of an Ed25519 key")
    return data[len(_ID_PREFIX) :]


def base58_encode(data: bytes) -> str:
    """Bytes as Bitcoin and libp2p write them."""
    number = int.from_bytes(data, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_ALPHABET[digit])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(digits))


def base58_decode(text: str) -> bytes:
    """The bytes behind a base58 text. Raises ValueError."""
    if not 0 < len(text) <= MAX_PEER_ID_CHARS:
        raise ValueError(f"a base58 id has 1 to {MAX_PEER_ID_CHARS} characters, not {len(text)}")
    number = 0
    for character in text:
        digit = _DIGITS.get(character)
        if digit is None:
            raise ValueError(f"{character!r} is not a base58 character")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
