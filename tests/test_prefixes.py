"""What a peer keeps of prompts: for whom, how much, and for how long."""

from collections.abc import Sequence

import pytest

from llmasos.config import PREFIX_LEASE_S, PREFIX_PAGE_TOKENS, PREFIX_SHARE
from llmasos.history import History
from llmasos.peer.prefixes import Prefixes
from llmasos.peer.runner import Speed
from llmasos.peer.scheduler import Scheduler
from llmasos.span import Span
from sim.runner import SimRunner, from_numbers

SPAN = Span(2, 5)
PAGE = PREFIX_PAGE_TOKENS


class Runner(SimRunner):
    """Remembers who is there; what is computed is not looked at here."""

    def __init__(self) -> None:
        super().__init__(SPAN, Speed(1e-3, 1e-4))
        self.held: dict[str, int] = {}

    def fork(self, source: str, target: str, tokens: int) -> None:
        self.held[target] = tokens

    def release(self, session: str) -> None:
        del self.held[session]


class Place:
    def __init__(self, kv_pages: int = 100) -> None:
        self.runner = Runner()
        self.scheduler = Scheduler(kv_pages * PAGE, 64)
        self.prefixes = Prefixes(self.runner, self.scheduler)

    def keep(self, keys: str, owner: str = "me", span: Span = SPAN, now: float = 0.0) -> None:
        """Of a session that has computed a page for each letter, and a little more."""
        outputs = History()
        outputs.write(0, from_numbers(range(len(keys) * PAGE + 7)))
        self.prefixes.keep(owner, span, pages(keys), "session", outputs, now)
        assert self.prefixes.tokens == sum(self.runner.held.values())

    def found(self, keys: str, owner: str = "me", span: Span = SPAN, now: float = 0.0) -> int:
        """How many pages."""
        prefix = self.prefixes.find(owner, span, pages(keys), now)
        if prefix is None:
            return 0
        assert prefix.outputs.length == prefix.tokens <= self.runner.held[prefix.source]
        return prefix.tokens // PAGE


def pages(keys: str) -> Sequence[bytes]:
    """A key for each letter; it stands for all before it too."""
    return [keys[: index + 1].encode() for index in range(len(keys))]


@pytest.fixture
def place() -> Place:
    return Place()


def test_the_longest_common_beginning_is_found(place: Place) -> None:
    place.keep("abcd")
    assert place.found("abcd") == 4
    assert place.found("abxy") == 2
    assert place.found("abcdefg") == 4
    assert place.found("xbcd") == 0
    assert place.found("") == 0


def test_it_belongs_to_one_client_and_one_span(place: Place) -> None:
    place.keep("ab")
    assert place.found("ab", owner="somebody else") == 0
    assert place.found("ab", span=Span(2, 4)) == 0


def test_what_a_longer_one_contains_is_not_kept_twice(place: Place) -> None:
    place.keep("ab")
    place.keep("abcd")
    place.keep("abc")
    assert place.prefixes.tokens == 4 * PAGE
    assert place.found("ab") == 2


def test_it_takes_a_share_of_the_budget_and_the_oldest_goes_first() -> None:
    place = Place(kv_pages=12)
    assert PREFIX_SHARE == 0.25
    place.keep("a")
    place.keep("b")
    place.keep("c")
    assert place.found("a") == 1  # used last now
    place.keep("d")
    assert [place.found(key) for key in "abcd"] == [1, 0, 1, 1]
    place.keep("efghij")
    assert place.found("efghij") == 0, "it is larger than the share"
    assert place.prefixes.tokens == 3 * PAGE


def test_sessions_come_first() -> None:
    place = Place(kv_pages=12)
    place.keep("ab")
    place.scheduler.admit("large", 11 * PAGE)
    place.prefixes.make_way(0.0)
    assert place.runner.held == {}
    assert place.found("ab") == 0


def test_what_nobody_asks_for_is_forgotten(place: Place) -> None:
    place.keep("ab", now=0.0)
    place.keep("xy", now=0.0)
    assert place.found("ab", now=PREFIX_LEASE_S - 1) == 2
    place.prefixes.make_way(PREFIX_LEASE_S + 1)
    assert place.found("xy") == 0
    assert place.found("ab") == 2


def test_a_page_is_found_where_it_was_in_the_prompt_and_nowhere_else(place: Place) -> None:
    place.keep("ab")
    assert place.prefixes.find("me", SPAN, [b"x", b"a"], 0.0) is None
    assert place.prefixes.find("me", SPAN, [b"ab"], 0.0) is None
    assert place.found("ab") == 2
