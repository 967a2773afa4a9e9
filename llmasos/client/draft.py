"""A small model on this machine that guesses what the large one in the swarm is going to say.

It has the same vocabulary and is greedy: what it guesses is checked as every guess is (speculation.py), so no text
changes by it. It reads along on a thread of its own, the prompt while the swarm does.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmasos.blocks.ends import load_ends
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, load_blocks
from llmasos.blocks.registry import ModelSpec, load_tokenizer, resolve
from llmasos.errors import UnsupportedModelError, UsageError
from llmasos.span import Span


class DraftModel:
    """All of a model, in int8 where the compiled kernels run it: a draft is wrong now and then anyway.

    Raises UsageError for a model with another vocabulary than that of `tokenizer`, and what loading raises.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.spec = resolve(name)
        if load_tokenizer(self.spec).get_vocab() != tokenizer.get_vocab():
            raise UsageError(
                f"{name} cannot draft for this model: they have different vocabularies",
                hint="take a smaller model of the same family",
            )
        self.blocks, quantization = _load_all(self.spec)
        self.ends = load_ends(self.spec, quantization=quantization)
        self.thread = ThreadPoolExecutor(1, "draft")

    def close(self) -> None:
        """Let the thread go."""
        self.thread.shutdown()


class DraftText:
    """A text that a draft model reads along. `read` and `guess` compute: call them on the model's thread."""

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._cache = model.blocks.new_cache()
        self._ids: list[int] = []
        self._cached: list[int] = []  # the tokens in the cache: of the text, and guesses

    def extend(self, ids: Iterable[int]) -> None:
        """The text goes on with `ids`."""
        self._ids.extend(ids)

    def read(self) -> None:
        """Have the cache hold the text but for its last token."""
        if len(self._ids) > 1:
            self._feed(self._ids[:-1])

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens; none behind the end of what the draft model can read."""
        if len(self._ids) + most > self._model.spec.context_tokens:
            return []
        text = list(self._ids)
        for _ in range(most):
            text.append(self._feed(text))
        return text[len(self._ids) :]

    def _feed(self, text: list[int]) -> int:
        """Have the cache hold exactly `text`. Returns the token that follows."""
        pairs = zip(self._cached, text, strict=False)
        common = next((n for n, (cached, token) in enumerate(pairs) if cached != token), len(self._cached))
        held = min(common, len(text) - 1)
        self._cache.truncate(held)
        model = self._model
        rows = model.ends.embed(text[held:], held)
        (out,) = model.blocks.forward([BlockChunk(self._cache, model.blocks.span, held, rows)])
        self._cached = list(text)
        return int(model.ends.logits(out[-1:])[0].argmax())


def _load_all(spec: ModelSpec) -> tuple[DecoderBlocks, str]:
    """Every block, and what they are rounded to."""
    span = Span(0, spec.blocks)
    try:
        return load_blocks(spec, span, quantize="int8"), "int8"
    except UnsupportedModelError:
        return load_blocks(spec, span), "none"
