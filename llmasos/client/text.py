"""Tokens -> text, piece by piece: never half a character, and nothing of a stop text."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer writes for bytes that are no character - yet, when they end a text."""


class Detokenizer:
    """Decodes a growing list of tokens. A piece is given out once no later token can change it."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A few tokens of context: many tokenizers write a leading space or not depending on what stands before.
        self._ids = list(prompt_ids[-8:])
        self._given = len(self._ids)
        self._prefix = 0

    def add(self, token: int) -> str:
        """The new text, empty while the token's bytes are only part of a character."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._prefix : self._given])
        now = self._decode(self._ids[self._prefix :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        # The window moves on: the part that was just completed is the context of the next.
        self._prefix, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopText:
    """The text of a generation so far. It ends before the first stop text, and holds back what may become one."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""

    @property
    def decoded(self) -> int:
        """Characters so far, with those that are held back."""
        return len(self.text) + len(self._held)

    def add(self, token: int) -> str:
        """The text that is certain to belong to the answer after this token."""
        return self._give(self._detokenizer.add(token), final=False)

    def finish(self) -> str:
        """The text that was held back, when no stop text came of it."""
        return "" if self.stopped else self._give(self._detokenizer.finish(), final=True)

    def _give(self, piece: str, *, final: bool) -> str:
        candidate = self._held + piece
        found = [index for stop in self._stop if (index := candidate.find(stop)) >= 0]
        if found:
            self.stopped = True
            given, self._held = candidate[: min(found)], ""
        else:
            held = 0 if final else max((_overlap(candidate, stop) for stop in self._stop), default=0)
            given, self._held = candidate[: len(candidate) - held], candidate[len(candidate) - held :]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
