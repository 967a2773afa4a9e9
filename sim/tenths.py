"""How far a long run is."""

import time

from llmasos.console import QUIET_S, say


class Tenths:
    """Says how far a long run is, each tenth of the way."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = 0
        self._begin = time.monotonic()

    def __call__(self, share: float) -> None:
        """It is that far."""
        tenth = int(10 * share)
        if tenth > self._said and time.monotonic() - self._begin > QUIET_S:
            self._said = tenth
            say(f"  {self._what}: {10 * tenth} %")
