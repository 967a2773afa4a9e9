"""Who is told what a peer does, as it does it. The simulator and embedded peers have nobody who listens."""


class Watcher:
    """Listens to nothing; whoever counts or shows what a peer does overrides what it wants to hear."""

    def ran(self, tokens: int, seconds: float) -> None:
        """A pass took that long for so many rows."""

    def waited(self, seconds: float) -> None:
        """A step is computed; all in all, that long it was not its turn."""

    def found(self, tokens: int) -> None:
        """A session begins with so many tokens that an earlier one has left in the cache."""

    def refused(self, why: str) -> None:
        """A session was not admitted."""
