"""Sessions of ours: where they are, and how much company they have had."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MEMORY_S = 60.0
"""Seconds of sessions after which what was before counts half: a busy gateway has learned in seconds, one with a text
now and then in minutes. Of 20, 30, 45, 60 and 90 the best for one that has hardly any (docs/log.md)."""
USUAL_COMPANY = 1.0
"""Before there is anything to go by: as if we were busy."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One session of ours on one peer. Two tickets are never the same."""

    peer: str
    session: str
    tokens: int
    opened_at: float


class Tickets:
    """The tickets that are open, each in the order of opening."""

    def __init__(self) -> None:
        self._by_peer: dict[str, list[Ticket]] = {}
        self._by_session: Counter[str] = Counter()
        self._company = USUAL_COMPANY
        self._counted_at = float("-inf")  # the company until then is in `_company`

    def __len__(self) -> int:
        return sum(map(len, self._by_peer.values()))

    def open(self, peer: str, session: str, tokens: int, now: float) -> Ticket:
        """A session begins there and reserves `tokens` of kv."""
        self._count(now)
        ticket = Ticket(peer, session, tokens, now)
        self._by_peer.setdefault(peer, []).append(ticket)
        self._by_session[session] += 1
        return ticket

    def close(self, ticket: Ticket, now: float) -> None:
        """That is over. May be said twice."""
        there = self._by_peer.get(ticket.peer, [])
        if ticket not in there:
            return
        self._count(now)
        there.remove(ticket)
        if not there:
            del self._by_peer[ticket.peer]
        self._by_session[ticket.session] -= 1
        if not self._by_session[ticket.session]:
            del self._by_session[ticket.session]

    def on(self, peer: str) -> Sequence[Ticket]:
        """Those on one peer."""
        return self._by_peer.get(peer, ())

    def company(self, now: float) -> float:
        """How many others of ours have run beside one of ours, while it ran: a mean that follows."""
        self._count(now)
        return self._company

    def _count(self, now: float) -> None:
        sessions = len(self._by_session)
        if sessions and now > self._counted_at:
            lived_s = sessions * (now - self._counted_at)
            self._company += (1.0 - 0.5 ** (lived_s / MEMORY_S)) * (sessions - 1 - self._company)
        self._counted_at = max(self._counted_at, now)
