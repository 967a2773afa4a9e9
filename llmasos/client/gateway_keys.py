"""API keys: made once, shown once, stored as a hash.

A key file is TOML that its owner may edit:

    [[key]]
    name = "alice"
    hash = "sha256:9f86d081884c7d65…"
    scopes = ["generate", "swarm"]
    models = ["smollm2"]                 # without it, all
    requests_per_minute = 60             # without it, no limit; so for the next two
    tokens_per_minute = 20000
    concurrent = 4

A key is 256 random bits, so a plain hash protects it: there is nothing to guess that a slow hash would make dearer.
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Any

from llmasos.errors import UsageError

SCOPES = ("generate", "swarm")
"""`generate` is everything under /v1 and the tokenizer; `swarm` is what is shown of the swarm, and the metrics."""
PREFIX = "sk-llmasos-"


@dataclass(frozen=True, slots=True)
class Key:
    """Whom a request comes from, and what they may. The key itself is not here."""

    name: str
    hash: str = ""
    scopes: tuple[str, ...] = SCOPES
    models: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        for scope in self.scopes:
            if scope not in SCOPES:
                raise UsageError(f"key {self.name}: {scope!r} is no scope", hint=f"scopes are {', '.join(SCOPES)}")
        for limit in ("requests_per_minute", "tokens_per_minute", "concurrent"):
            value = getattr(self, limit)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"key {self.name}: {limit} is {value!r}, not a whole number above zero")


ANYBODY = Key("anybody")
"""Who calls a gateway that has no keys."""


class KeyRing:
    """The keys of a file."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys

    def find(self, secret: str) -> Key | None:
        """Whose key this is. Takes the same time wherever it stands, and however much of it is right."""
        hashed, found = hash_of(secret), None
        for key in self._keys:
            if hmac.compare_digest(hashed.encode(), key.hash.encode()):
                found = key
        return found


def hash_of(secret: str) -> str:
    """How a key is stored."""
    return "sha256:" + hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def new_key(name: str) -> tuple[str, str]:
    """A new key, and the lines of a key file that let it in."""
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise UsageError(f"{name!r} is no name for a key", hint="letters, digits and . _ - @, at most 64 of them")
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, f'[[key]]\nname = "{name}"\nhash = "{hash_of(secret)}"\n'


def load_keys(path: Path) -> KeyRing:
    """Read a key file. Raises UsageError for one that is not as it should be, before anybody relies on it."""
    try:
        entries = _entries(path)
    except FileNotFoundError as error:
        raise UsageError(f"the key file {path} cannot be read: {error.strerror}", hint=_make(path)) from error
    if not entries:
        raise UsageError(f"the key file {path} holds no [[key]]", hint=_make(path))
    keys = [_key(entry, path) for entry in entries]
    names = [key.name for key in keys]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"the key file {path} has two keys named {', '.join(sorted(twice))}",
            hint="give one of them another name there, or delete it",
        )
    return KeyRing(keys)


def check_new(name: str, path: Path) -> None:
    """Raises UsageError when the file has a key of that name already, or is damaged. There need be none yet."""
    try:
        entries = _entries(path)
    except FileNotFoundError:
        return
    if any(isinstance(entry, dict) and entry.get("name") == name for entry in entries):
        raise UsageError(
            f"the key file {path} already has a key named {name}",
            hint="no two keys have one name: take another, or delete its [[key]] from the file to make it anew",
        )


def _entries(path: Path) -> list[Any]:
    """The keys in a file, as they stand there. Raises UsageError, and FileNotFoundError where there is none."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"the key file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the key file {path} is not TOML: {error}", hint=_mend(path)) from error
    entries = found.pop("key", [])
    if found:
        raise UsageError(f"the key file {path} holds {', '.join(found)}, and may hold [[key]] alone", hint=_mend(path))
    if not isinstance(entries, list):
        raise UsageError(f"the key file {path} holds no [[key]]", hint=_mend(path))
    return entries


def _key(entry: Any, path: Path) -> Key:
    known = {field.name for field in fields(Key)}
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UsageError(f"a key in {path} has no name", hint=_mend(path))
    if unknown := set(entry) - known:
        raise UsageError(f"key {entry['name']} in {path}: {', '.join(sorted(unknown))} means nothing here")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", str(entry.get("hash"))):
        raise UsageError(f"key {entry['name']} in {path} has no hash of the form sha256:…", hint=_mend(path))
    lists = {name: tuple(_list(entry, name, path)) for name in ("scopes", "models") if name in entry}
    return Key(**{**entry, **lists})


def _list(entry: dict[str, Any], name: str, path: Path) -> list[str]:
    value = entry[name]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(
            f"key {entry['name']} in {path}: {name} is {value!r}, not a list", hint=f'write it as {name} = ["…"]'
        )
    return value


def _make(path: Path) -> str:
    return f"make one: llmasos key alice --file {quote(str(path))}"


def _mend(path: Path) -> str:
    """No command adds a key to a damaged file."""
    file, aside = quote(str(path)), quote(f"{path}.old")
    return f"mend it by hand, or begin a new one: mv {file} {aside} && llmasos key alice --file {file}"
