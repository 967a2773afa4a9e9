"""How long sessions that decode are away between two steps: to the client, through its head and back.

A pass over nothing but prompts that begins while one is about to return makes its token wait for all of that pass; a
pass over tokens of others then, and every weight is read twice.
Pure bookkeeping; times are seconds of any one clock.
"""

import math
from dataclasses import dataclass

LATE = 1.5
"""Times the usual absence: who is away for longer is expected no more, nor who is late by more than a wait is worth."""


@dataclass(slots=True)
class _Absence:
    since: float | None = None  # None: it is here
    usual_s: float | None = None


class Absences:
    """Who is away since when, and for how long usually: so long as the shortest of the last few times.

    What makes an absence longer is often the pass that did not wait for it: a machine that both share is busy then.
    """

    def __init__(self) -> None:
        self._of: dict[str, _Absence] = {}

    def leaves(self, session: str, now: float) -> None:
        """A step of a session that decodes is done."""
        absence = self._of.get(session)
        if absence is None:
            absence = self._of[session] = _Absence()
        absence.since = now

    def returns(self, session: str, now: float) -> None:
        """Its next step is here."""
        absence = self._of.get(session)
        if absence is None or absence.since is None:
            return
        gone_s, absence.since = now - absence.since, None
        if absence.usual_s is None or gone_s < absence.usual_s:
            absence.usual_s = gone_s
        else:
            absence.usual_s += (gone_s - absence.usual_s) / 4

    def forget(self, session: str) -> None:
        """It is over."""
        self._of.pop(session, None)

    def wait_s(self, now: float, within_s: float, *, away_s: float = math.inf) -> float:
        """How long to wait until all are back, or late, that are usually back within that time and are never away for
        much longer than `away_s`; 0: for nobody. Who is away for the first time is waited for once, for that long:
        nothing else can tell how long it is away for if nobody is in its way.
        """
        ends = [_end(absence, now, within_s, away_s) for absence in self._of.values() if absence.since is not None]
        return max(max(ends) - now, 0.0) if ends else 0.0


def _end(absence: _Absence, now: float, within_s: float, away_s: float) -> float:
    """Until when to wait for one that is away; `now` or before: not at all."""
    since, usual_s = absence.since, absence.usual_s
    assert since is not None, "nobody waits for who is here"
    if usual_s is None:
        return since + within_s if away_s == math.inf else now
    if usual_s > away_s or since + usual_s - now > within_s:
        return now
    return since + min(LATE * usual_s, usual_s + within_s)
