"""How many rows of prompts go into a pass beside tokens: as many as do not stretch it too far.

A row costs more the more it attends to - at the end of a prompt of 2,000 tokens of a small model twice what it did at
its beginning - and what a peer measured before it began is the truth of that moment. So costs are taken from the passes
themselves. Pure bookkeeping; times are seconds of any one clock.
"""

from llmasos.config import PROMPT_STRETCH

MIN_ROWS = 8
"""So many rows hardly take longer than one, since both wait for the weights: fewer would only hold up the prompt."""
SHRINK = 2
"""Times fewer rows than at the speed that was measured first, at most: a machine that others slow down for a while must
not take prompts for what does it."""
_NEWS = 0.25
"""What one pass counts for against those before it."""


class Pace:
    """Follows what rows cost. `rows` beside a token make a pass `PROMPT_STRETCH` times as long as it is without."""

    def __init__(self, alone_s: float, row_s: float, most: int) -> None:
        """`alone_s` is what a pass of one row takes, `row_s` each further one, `most` the rows of a pass."""
        self.alone_s = alone_s
        """What a pass of one row takes: reading every weight once."""
        self._row_s = row_s
        self._most = most
        self._least = 1
        self._least = max(self.rows // SHRINK, min(MIN_ROWS, most))

    @property
    def rows(self) -> int:
        """How many of prompts to take."""
        return min(max(int((PROMPT_STRETCH - 1) * self.alone_s / self._row_s), self._least), self._most)

    def ran(self, rows: int, seconds: float) -> None:
        """A pass of so many rows took that long. Those of a few rows tell nothing: they are neither."""
        if rows == 1:
            self.alone_s += _NEWS * (seconds - self.alone_s)
        elif rows > MIN_ROWS:
            row_s = (seconds - self.alone_s) / (rows - 1)
            self._row_s += _NEWS * (max(row_s, self.alone_s / self._most) - self._row_s)
