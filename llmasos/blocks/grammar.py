"""Constrained decoding: which tokens may come next so that the text obeys a JSON schema.

llguidance keeps the state of the grammar; this is its place between a tokenizer and the sampler.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from llmasos.errors import UnsupportedModelError, UsageError

ANY_OBJECT = '{"type": "object"}'
"""The schema of "some JSON object"."""


class Grammar:
    """One text on its way through a schema."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next: (vocab,), bool. An end-of-text token may where the text is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        return torch.from_numpy(mask)

    def take(self, token: int) -> bool:
        """Go on behind `token`; returns whether the text is complete and nothing may follow."""
        if not self._matcher.consume_token(token):
            raise UsageError(f"response_format: {self._matcher.get_error() or 'the text left the schema'}")
        return bool(self._matcher.is_stopped())


class Grammars:
    """Makes the grammars of one model. What they share takes a second to build and is built when first needed."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._shared: LLTokenizer | None = None
        self._building = threading.Lock()

    def start(self, schema: str) -> Grammar:
        """A grammar for a JSON schema. Raises UsageError for one that cannot be enforced."""
        with self._building:
            if self._shared is None:
                self._shared = self._build()
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema)
            matcher = LLMatcher(self._shared, grammar)
        except ValueError as error:
            raise UsageError(f"response_format: {error}") from error
        if matcher.is_error():
            raise UsageError(f"response_format: {matcher.get_error()}")
        return Grammar(matcher, self._vocab_size)

    def _build(self) -> LLTokenizer:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or not self._eos:
            raise UnsupportedModelError("response_format needs a fast tokenizer, which this model has not")
        return LLTokenizer(backend.to_str(), n_vocab=self._vocab_size, eos_token=self._eos)
