"""Whose mistake it is when rows are wrong: that of whoever sent them, or of whoever says so.

A peer that says that our rows are wrong may be right, mistaken, or lying. One is not believed: it has failed us, and
another peer is tried. If that one says the same, or there is none, the mistake is ours.

That is so for the first hop. Rows that any other refuses were made by the hop before it: nobody can tell which of the
two is wrong, both have failed us, and the mistake is never ours. Rows that come back to us we can judge ourselves.
"""

from collections.abc import Callable
from dataclasses import replace

from llmasos.client.flights import Flight, Flights
from llmasos.client.hop import HopLink, as_peer_error
from llmasos.client.hops import Hops
from llmasos.errors import PeerError, PeerFaultError, UsageError, short_id
from llmasos.routing.request import RouteRequest
from llmasos.wire import Failed, Tensor


class Blame:
    """Who blames the rows that a session has sent last, and whom it can blame itself.

    `sound` says of rows that look like ours whether they can be an answer: that depends on what they mean.
    """

    def __init__(self, hops: Hops, flights: Flights, sound: Callable[[Tensor], bool]) -> None:
        self.error: UsageError | None = None
        """What the mistake would be, if it is ours."""
        self._by = ""
        self._hops = hops
        self._flights = flights
        self._sound = sound
        self._sent: tuple[str, int] | None = None  # what numbers our rows are made of, and how many

    def begin(self, rows: Tensor) -> None:
        """There are other rows now, such as these."""
        self.error = None
        self._sent = rows.dtype, rows.hidden

    def verdict(self, hop: HopLink, failure: Failed) -> UsageError | dict[HopLink, PeerError]:
        """A hop tells of a failure: our mistake, or the hops that have failed us, and how."""
        peer = hop.plan.peer
        failed: dict[HopLink, PeerError] = {hop: as_peer_error(peer, failure)}
        if failure.code != "bad_request" or hop not in self._hops:
            return failed
        flight = self._flights.waiting(failure.step) if failure.step is not None else None
        first = flight.first if flight is not None else 0  # in a replay, hops before that one were sent no rows
        index = self._hops.index(hop)
        if index == first == 0:
            return self._believed(peer, failure.message) or failed
        if failure.step is not None and index >= max(first, 1):
            sender = self._hops[index - 1]
            failed[sender] = PeerFaultError(sender.plan.peer, f"its rows are refused by {short_id(peer)}")
        return failed

    def flaw(self, hop: HopLink, answer: Tensor, flight: Flight) -> str:
        """What is wrong with an answer of that hop; nothing where its rows are such as we have sent."""
        if answer.tokens != flight.keep and not hop.relay:
            return f"{answer.tokens} rows"
        if not flight.keep:
            return ""
        if answer.codec != "exact":
            return f"{answer.codec} rows"
        if (answer.dtype, answer.hidden) != self._sent:
            return f"{answer.dtype} rows of {answer.hidden}"
        return "" if self._sound(answer) else "rows that are not finite"

    def asked_of_others(self, request: RouteRequest) -> RouteRequest:
        """The same request, to peers other than the one that blames us."""
        return request if self.error is None else replace(request, exclude=request.exclude | {self._by})

    def _believed(self, peer: str, message: str) -> UsageError | None:
        """A peer blames us: our mistake, if another one has said so before."""
        agreed = self.error is not None and self._by != peer
        self.error, self._by = UsageError(f"peer {short_id(peer)}: {message}"), peer
        return self.error if agreed else None
