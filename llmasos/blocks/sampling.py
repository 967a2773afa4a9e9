"""From logits to the next token, with the processors of transformers in the order of its `generate`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmasos.errors import UsageError

MIN_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken, which is what the limit means; float32 cannot divide by much less."""
MIN_REPETITION_PENALTY = 0.01
"""Scores are divided by it; they reach a few hundred, and have to stay finite."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a token. Temperature 0 takes the likeliest; a seed makes the draws repeatable."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are not drawn."""
    presence_penalty: float = 0.0
    """Taken off the score of each token that was generated before."""
    frequency_penalty: float = 0.0
    """The same, once for each time that it was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its score)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature} is not a number from 0 up")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} does not lie in (0, 1]")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is negative", hint="0 means no limit")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty >= MIN_REPETITION_PENALTY):
            raise UsageError(
                f"repetition_penalty {self.repetition_penalty} is not a number from {MIN_REPETITION_PENALTY} up"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"seed {self.seed} does not fit into 64 bits")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p {self.min_p} does not lie in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} {getattr(self, name)} is not a finite number")
        for token, bias in self.logit_bias:
            if token < 0 or not math.isfinite(bias):
                raise UsageError(f"logit_bias of {bias} for token {token} is not a finite number for a token")

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, and how likely the model found it before any option of sampling; `top` holds the likeliest, best first.

    `logprob` is None for the first token of a text, which nothing foretells.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one generation. Holds its own random state; the global one is not touched.

    `prompt_tokens` says where the generated tokens begin: only those are counted by presence and frequency penalties.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int = 0) -> None:
        self.params = params
        self._processors = _processors(params, prompt_tokens)
        self._random = torch.Generator()
        if params.seed is not None:
            self._random.manual_seed(params.seed)
        else:
            self._random.seed()

    def __call__(self, token_ids: Sequence[int], logits: torch.Tensor, allowed: torch.Tensor | None = None) -> int:
        """The next token after `token_ids`, given `logits` of shape (vocab,); only one of `allowed`, a mask of them."""
        scores = logits.detach().to("cpu", torch.float32)[None]  # (1, vocab)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        if self._processors:
            history = torch.tensor([list(token_ids)], dtype=torch.long)  # (1, tokens)
            scores = self._processors(history, scores)
        if self.params.greedy:
            return int(scores.numpy().argmax())  # torch takes ten times as long for one row
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._random))


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """For each row of `logits`, (rows, vocab), the token that stood or was chosen there and the `top` likeliest."""
    logprobs = torch.log_softmax(logits.detach().to("cpu", torch.float32), dim=-1)
    chosen = logprobs[torch.arange(len(tokens)), torch.tensor(list(tokens), dtype=torch.long)].tolist()
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    best = [tuple(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]
    return [Scored(token, chance, row) for token, chance, row in zip(tokens, chosen, best, strict=True)]


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    """Presence and frequency penalties as the OpenAI interface defines them; transformers has none."""

    def __init__(self, params: SamplingParams, prompt_tokens: int) -> None:
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens, counts = torch.unique(input_ids[0, self._prompt_tokens :], return_counts=True)
        scores = scores.clone()
        scores[0, tokens] -= self._presence + self._frequency * counts.to(scores.dtype)
        return scores


class _Bias(LogitsProcessor):  # type: ignore[misc]
    """Adds to the scores of some tokens. transformers has one for sequences, at many times the cost."""

    def __init__(self, bias: Sequence[tuple[int, float]]) -> None:
        self._tokens = torch.tensor([token for token, _ in bias], dtype=torch.long)
        self._values = torch.tensor([value for _, value in bias], dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(1, self._tokens, self._values[None])


def _processors(params: SamplingParams, prompt_tokens: int) -> LogitsProcessorList:
    """Those that change anything, in the order in which `generate` applies them."""
    chosen = LogitsProcessorList()
    if params.logit_bias:
        chosen.append(_Bias(params.logit_bias))
    if params.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(penalty=params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        chosen.append(_Penalties(params, prompt_tokens))
    if params.greedy:
        return chosen
    if params.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k != 0:
        chosen.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1.0:
        chosen.append(TopPLogitsWarper(top_p=params.top_p))
    if params.min_p > 0.0:
        chosen.append(MinPLogitsWarper(min_p=params.min_p))
    return chosen
