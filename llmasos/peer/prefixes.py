"""Prompts that begin alike: what a peer keeps of a session's first tokens, so that the next session need not compute
them.

A client names the pages of its prompt, each by a key that stands for all tokens up to the end of that page. What a
session has computed of them stays behind, as a session of the runner that nobody writes to, with the rows that it
passed on. A new session that names the same keys begins with a fork of it.

What is kept belongs to the client that had it computed: a stranger can neither find out what others ask, nor leave kv
behind that others would go on from. It uses room that no session has reserved, a quarter of the budget at most, and
gives way when a session needs it.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from llmasos.config import PREFIX_LEASE_S, PREFIX_PAGE_TOKENS, PREFIX_SHARE
from llmasos.history import History
from llmasos.peer.runner import Runner
from llmasos.peer.scheduler import Scheduler
from llmasos.span import Span

_Place = tuple[str, Span, int, bytes]
"""Whose it is, the blocks that it was computed by, which page of the prompt, and the key."""


@dataclass(slots=True)
class _Entry:
    places: list[_Place]  # of each page
    outputs: History
    used_at: float

    @property
    def tokens(self) -> int:
        return len(self.places) * PREFIX_PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Prefix:
    """A beginning that is there: `source` is its session in the runner."""

    source: str
    tokens: int
    outputs: History


class Prefixes:
    """What one peer keeps. `tokens` are cached for it."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.tokens = 0
        self._runner = runner
        self._scheduler = scheduler
        self._names = itertools.count()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the one that was not used for longest stands first
        self._by_place: dict[_Place, str] = {}

    def find(self, owner: str, span: Span, keys: Sequence[bytes], now: float) -> Prefix | None:
        """The longest beginning of these pages that is there."""
        for pages in range(len(keys), 0, -1):
            name = self._by_place.get((owner, span, pages, keys[pages - 1]))
            if name is not None:
                entry = self._entries[name]
                entry.used_at = now
                self._entries.move_to_end(name)
                outputs = entry.outputs.copy()
                outputs.cut(pages * PREFIX_PAGE_TOKENS)
                return Prefix(name, pages * PREFIX_PAGE_TOKENS, outputs)
        return None

    def keep(self, owner: str, span: Span, keys: Sequence[bytes], session: str, outputs: History, now: float) -> None:
        """Keep the pages `keys`, which `session` has cached and passed on. Not while a pass works on it."""
        places = [(owner, span, page, key) for page, key in enumerate(keys, start=1)]
        if not places or places[-1] in self._by_place:
            return
        entry = _Entry(places, outputs.copy(), now)
        entry.outputs.cut(entry.tokens)
        if entry.tokens > self._room:
            return
        name = f"prefix {next(self._names)}"
        self._runner.fork(session, name, entry.tokens)
        for older in {self._by_place[place] for place in places if place in self._by_place}:
            if self._entries[older].places[-1] in places:  # all of it is in the new one
                self._drop(older)
        self._entries[name] = entry
        self._by_place.update(dict.fromkeys(places, name))
        self.tokens += entry.tokens
        self.make_way(now)

    def make_way(self, now: float) -> None:
        """Drop what sessions need the room of, and what nobody has asked for in a long time."""
        while self._entries:
            name, entry = next(iter(self._entries.items()))
            if self.tokens <= self._room and now - entry.used_at <= PREFIX_LEASE_S:
                return
            self._drop(name)

    @property
    def _room(self) -> int:
        return min(int(self._scheduler.kv_tokens * PREFIX_SHARE), self._scheduler.kv_free_tokens)

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name)
        self.tokens -= entry.tokens
        for place in entry.places:
            if self._by_place.get(place) == name:
                del self._by_place[place]
        self._runner.release(name)
