"""Chooses the tokens of one text where its scores are made: on the thread of the model's ends.

Whatever a text needs of that thread between two steps is done in one visit. Each more costs more than choosing does:
two threads of Python that run by turns wait for each other.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from llmasos.blocks.ends import ModelEnds
from llmasos.blocks.grammar import Grammar
from llmasos.blocks.sampling import Sampler, Scored, score
from llmasos.blocks.tensors import from_torch
from llmasos.wire import Tensor

if TYPE_CHECKING:
    import torch


class Chooser:
    """Of one text. Tokens are scored themselves only if `top` says so."""

    def __init__(
        self,
        ends: ModelEnds,
        eos_token_ids: Collection[int],
        sampler: Sampler,
        grammar: Grammar | None,
        top: int | None,
    ) -> None:
        self.complete = False
        """Whether the text must not go on."""
        self.last: Tensor | None = None
        """The last token, embedded: what the next step begins with, (1, hidden)."""
        self._ends = ends
        self._eos = eos_token_ids
        self._sampler = sampler
        self._grammar = grammar
        self._top = top

    def choose(self, ids: Sequence[int], guesses: Sequence[int], logits: "torch.Tensor") -> list[Scored]:
        """The tokens behind `ids`, given the scores of what follows them and each guess, (1 + guesses, vocab): up to
        the first that was not guessed.
        """
        chosen: list[Scored] = []
        for index in range(len(logits)):
            scored = self._one(ids, logits[index : index + 1])
            chosen.append(scored)
            if self.complete:
                return chosen
            if index == len(guesses) or guesses[index] != scored.token:
                break
            ids = [*ids, scored.token]
        self.last = from_torch(self._ends.embed([chosen[-1].token], len(ids)))
        return chosen

    def _one(self, ids: Sequence[int], logits: "torch.Tensor") -> Scored:
        grammar, top = self._grammar, self._top
        token = self._sampler(ids, logits[0], grammar.allowed() if grammar is not None else None)
        self.complete = token in self._eos or (grammar is not None and grammar.take(token))
        return Scored(token, None) if top is None else score(logits, [token], top)[0]
