"""From logits to the next token, with the processors of transformers in the order of its `generate`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmasos.errors import UsageError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a token. Temperature 0 takes the likeliest; a seed makes the draws repeatable."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature} is not a number from 0 up")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} does not lie in (0, 1]")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is negative", hint="0 means no limit")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(f"repetition_penalty {self.repetition_penalty} is not a positive number")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"seed {self.seed} does not fit into 64 bits")


class Sampler:
    """Chooses the tokens of one generation. Holds its own random state; the global one is not touched."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._processors = _processors(params)
        self._random = torch.Generator()
        if params.seed is not None:
            self._random.manual_seed(params.seed)
        else:
            self._random.seed()

    def __call__(self, token_ids: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after `token_ids`, given `logits` of shape (vocab,)."""
        history = torch.tensor([list(token_ids)], dtype=torch.long)  # (1, tokens)
        scores = self._processors(history, logits.detach().to("cpu", torch.float32)[None])  # (1, vocab)
        if self.params.temperature == 0:
            return int(scores.argmax(dim=-1))
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._random))


def _processors(params: SamplingParams) -> LogitsProcessorList:
    """Those that change anything, in the order in which `generate` applies them."""
    chosen = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(penalty=params.repetition_penalty))
    if params.temperature == 0:
        return chosen
    if params.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k != 0:
        chosen.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1.0:
        chosen.append(TopPLogitsWarper(top_p=params.top_p))
    return chosen
