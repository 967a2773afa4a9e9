"""Guess the next tokens, from the text itself or with a small model, and let one pass check the guesses.

Prompt lookup (Saxena, 2023): if the last few tokens have occurred before, what followed then is a good guess for what
follows now. A draft model (draft.py) has one where nothing is repeated. The guesses travel behind the last token in the
same step, and every position is sampled as if it had come alone, so the text is the one that would have come without
guessing - greedy or sampled - only in fewer trips through the swarm. A wrong guess is rolled back by the next step's
position.

Whether guessing pays is measured, not assumed: a step with guesses takes longer, and it pays when it brings more tokens
per second than a plain one. What is not known to pay is tried on an account: a plain step earns `MAX_LOSS` of a step, a
guess costs what its step took longer than a plain one less the tokens that it brought, and while the account is in the
red nothing is tried. So the worst text is slower by `MAX_LOSS` and one wrong guess, and where guesses are cheap, as on
links that are longer than the computing, they are tried often. `Speculator` is pure bookkeeping: the caller tells it
what came of each step.
"""

from collections.abc import Iterable
from typing import Protocol

MAX_NGRAM = 3
MIN_NGRAM = 2
"""A single token occurs too often to say anything; four in a row rarely find a match that three do not."""
FIRST_GUESSES = 2
"""A try that fails should cost little; those that come true double the next."""
MAX_GUESSES = 12
"""A pass of up to 16 rows takes about as long as one of two (docs/log.md); beyond that rows cost."""
MEMORY = 0.8
"""Weight of the past in the moving averages: about the last five steps count."""
MAX_LOSS = 0.02
"""The share of the time that tries may cost, where none of them comes true."""
MAX_DEBT = 1.0
"""In plain steps: one step that was late for another reason must not end all tries."""
MARGIN = 1.02
"""How much faster guessing must be than not guessing."""


class Guesser(Protocol):
    """What knows the text and has an idea of how it goes on."""

    def extend(self, ids: Iterable[int]) -> None:
        """The text goes on with `ids`."""

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens."""


class NgramIndex:
    """Where each short run of tokens was seen last. Grows with the text."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # a run of tokens -> the position of what followed it last

    def extend(self, ids: Iterable[int]) -> None:
        """The text goes on with `ids`."""
        for token in ids:
            end = len(self._ids)
            for length in range(MIN_NGRAM, min(MAX_NGRAM, end) + 1):
                self._ends[tuple(self._ids[end - length :])] = end
            self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest known run at the end of the text."""
        for length in range(min(MAX_NGRAM, len(self._ids)), MIN_NGRAM - 1, -1):
            position = self._ends.get(tuple(self._ids[-length:]))
            if position is not None:
                followed = self._ids[position:]  # if that reaches the end, the text is taken to repeat itself
                return [followed[index % len(followed)] for index in range(most)]
        return []


class Speculator:
    """Decides how much to guess, from what guessing has brought."""

    def __init__(self, prompt_ids: Iterable[int], guesser: Guesser | None = None) -> None:
        self._guesser = guesser or NgramIndex()
        self._guesser.extend(prompt_ids)
        self._guesses = FIRST_GUESSES
        self._plain_s = 0.0  # a step without guesses
        self._guessed_s = 0.0  # a step with some
        self._accepted = 0.0  # right guesses a step
        self._account = 0.0  # in plain steps: what tries may cost, never above zero

    def propose(self, room: int) -> list[int]:
        """Guesses for what follows, at most `room`; none when guessing does not pay and cannot be tried now."""
        if self._plain_s == 0.0:
            return []  # the first plain step tells what a step takes
        if not self.pays and self._account < 0.0:
            return []
        return self._guesser.guess(min(self._guesses, room))

    @property
    def pays(self) -> bool:
        """Whether steps with guesses are known to bring more tokens per second."""
        if self._guessed_s == 0.0:
            return False
        return (1 + self._accepted) * self._plain_s > MARGIN * self._guessed_s

    def extend(self, ids: Iterable[int]) -> None:
        """The text goes on with `ids`."""
        self._guesser.extend(ids)

    def took(self, seconds: float, guessed: int, accepted: int) -> None:
        """A decoding step took so long, with so many guesses, of which so many came true."""
        if not guessed:
            self._plain_s = _blend(self._plain_s, seconds)
            self._account = min(self._account + MAX_LOSS, 0.0)
            return
        first = self._guessed_s == 0.0
        self._guessed_s = _blend(self._guessed_s, seconds)
        self._accepted = float(accepted) if first else MEMORY * self._accepted + (1 - MEMORY) * accepted
        self._account += accepted + 1 - seconds / self._plain_s
        self._account = max(min(self._account, 0.0), -MAX_DEBT)
        self._guesses = min(2 * guessed, MAX_GUESSES) if accepted == guessed else max(accepted + 1, MIN_NGRAM)


def _blend(average: float, sample: float) -> float:
    return sample if average == 0.0 else MEMORY * average + (1 - MEMORY) * sample
