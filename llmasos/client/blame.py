"""What to make of a peer that says that our rows are wrong: it may be right, mistaken, or lying.

One is not believed: it has failed us, and another peer is tried. If that one says the same, or there is none, the
mistake is ours.

That is so for the first hop. Rows that any other refuses were made by the hop before it: nobody can tell which of the
two is wrong, both have failed us, and the mistake is never ours.
"""

from dataclasses import replace

from llmasos.errors import UsageError, short_id
from llmasos.routing.request import RouteRequest


class Blame:
    """Who blames the rows that a session has sent last."""

    def __init__(self) -> None:
        self.error: UsageError | None = None
        """What the mistake would be, if it is ours."""
        self._by = ""

    def believed(self, peer: str, message: str) -> UsageError | None:
        """A peer blames us: our mistake, if another one has said so before."""
        agreed = self.error is not None and self._by != peer
        self.error, self._by = UsageError(f"peer {short_id(peer)}: {message}"), peer
        return self.error if agreed else None

    def clear(self) -> None:
        """There are other rows now."""
        self.error = None

    def asked_of_others(self, request: RouteRequest) -> RouteRequest:
        """The same request, to peers other than the one that blames us."""
        return request if self.error is None else replace(request, exclude=request.exclude | {self._by})
