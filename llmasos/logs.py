"""What a line of the log is about: the request and the session that the running task works for."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import msgspec

_about: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039 - never changed in place


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """Until this ends, what this task logs carries these ids; so does what tasks log that it starts meanwhile."""
    before = _about.get()
    _about.set({**before, **ids})
    try:
        yield
    finally:
        _about.set(before)  # not a token's reset: a generator may be closed by another task than began it


def session_label(name: str) -> str:
    """What logs call a session, the same at its client and on each hop. Who knows its name could speak for it."""
    return hashlib.sha256(name.partition(".")[0].encode()).hexdigest()[:12]


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for machines, with the ids of what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()
