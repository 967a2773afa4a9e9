"""Steps that are under way, and what becomes of them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from llmasos.errors import LLMasOSError
from llmasos.wire import Result, Step, Tensor

SUSPECT_FACTOR = 4.0
"""Times what answers took lately: a step that has to wait for others' prompts takes two or three times its usual."""
MIN_SUSPECT_AFTER_S = 0.5
"""Steps of a few milliseconds are late now and then for reasons that no ping has to look into."""


@dataclass(slots=True)
class Flight:
    """A step that has no answer yet. `replay` hops from the index `first` on take part when it is a replay."""

    position: int
    keep: int
    answer: asyncio.Future[Tensor | None]
    first: int = 0
    replay: int = 0
    tokens: int = 0
    sent_at: float = 0.0

    def give_up(self) -> None:
        """Whoever waits for the answer gets None; it may still come."""
        if not self.answer.done():
            self.answer.set_result(None)
            self.answer = self.answer.get_loop().create_future()

    def onward(self, result: Result, replay: int) -> Step:
        """The step for the next hop, of a result that came to us to be relayed."""
        return Step(
            step=result.step,
            position=self.position,
            keep=self.keep,
            hidden=result.hidden,
            replay=replay,
            spent=result.spent,
        )


class Flights:
    """The steps of one session that are in the air, by their number."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._flights: dict[int, Flight] = {}
        self._slowest_s = 0.0  # what an answer took lately, the slow ones above all; 0 before the first

    def __contains__(self, number: int | None) -> bool:
        return number in self._flights

    def start(self, number: int, position: int, keep: int, first: int = 0, replay: int = 0, tokens: int = 0) -> None:
        """Expect an answer to that step, which is sent now."""
        answer: asyncio.Future[Tensor | None] = asyncio.get_running_loop().create_future()
        self._flights[number] = Flight(position, keep, answer, first, replay, tokens, self._clock())

    def waiting(self, number: int) -> Flight | None:
        """The flight of that number, while it has neither an answer nor an error."""
        flight = self._flights.get(number)
        return flight if flight is not None and not flight.answer.done() else None

    async def answer(self, number: int, timeout_s: float) -> Tensor | None:
        """The answer to a step, None if there is none within that time. Raises what the step failed with."""
        flight = self._flights[number]
        timer = asyncio.get_running_loop().call_later(timeout_s, flight.give_up)
        try:
            answer = await flight.answer
        finally:
            timer.cancel()
        if answer is not None:
            del self._flights[number]
        return answer

    def took(self, seconds: float) -> None:
        """An answer came after that time, and nothing was wrong."""
        self._slowest_s = max(seconds, 0.8 * self._slowest_s)

    def patience_s(self, most_s: float) -> float:
        """How long an answer may take before one asks whether all are well: a multiple of what was usual."""
        return min(most_s, max(MIN_SUSPECT_AFTER_S, SUSPECT_FACTOR * self._slowest_s)) if self._slowest_s else most_s

    def fail(self, error: LLMasOSError) -> None:
        """Nothing that is in the air will arrive."""
        for flight in self._flights.values():
            if not flight.answer.done():
                flight.answer.set_exception(error)

    def forget(self) -> None:
        """Nobody waits any more."""
        for flight in self._flights.values():
            if not flight.answer.cancel() and not flight.answer.cancelled():
                flight.answer.exception()  # seen: asyncio reports those that nobody looked at
        self._flights.clear()
