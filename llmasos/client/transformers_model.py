"""A `transformers` model whose blocks live in the swarm: `.generate()` with all that transformers' generation offers.

The model is stateless towards its caller: each call gives it the whole text of each row. What makes it quick is that
each row of the batch has a session that remembers the tokens it has computed: what a call shares with the one before is
not computed again. Beam search needs nothing more: when beams change places, a session is rolled back to what it shares
with its new text.
"""

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmasos.client.client import LLMasOS
from llmasos.client.generate import Dialogue, Generator
from llmasos.config import ClientConfig
from llmasos.errors import UsageError

SPARE_TOKENS = 256
"""Reserved behind the first text of a row; a session that outgrows it asks its peers for more."""


class SwarmCache(Cache):  # type: ignore[misc]
    """Looks like a kv cache to transformers; the kv is with the peers, one session for each row of the batch."""

    def __init__(self, client: LLMasOS, model_name: str) -> None:
        super().__init__(layers=[])
        self._client = client
        self._model_name = model_name
        self._sessions = AsyncExitStack()
        self._dialogues: list[Dialogue] = []

    async def dialogue(self, row: int, tokens: int) -> Dialogue:
        """The session of a row; opened when first asked for."""
        while len(self._dialogues) <= row:
            opening = self._client.asynchronous.dialogue(self._model_name, tokens + SPARE_TOKENS)
            self._dialogues.append(await self._sessions.enter_async_context(opening))
        return self._dialogues[row]

    async def close(self) -> None:
        """End the sessions."""
        self._dialogues.clear()
        await self._sessions.aclose()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: whole texts are asked for, and the sessions know what they hold of them."""
        return 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beams have changed places. Nothing to do: see the module's docstring."""


class SwarmModelForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model in the swarm. Close it, or use it as a context manager."""

    main_input_name = "input_ids"

    def __init__(self, client: LLMasOS, model_name: str, generator: Generator) -> None:
        super().__init__(generator.spec.config)
        self._client = client
        self._model_name = model_name
        self._generator = generator
        eos = list(generator.spec.eos_token_ids)
        self.generation_config = GenerationConfig(eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0)

    @classmethod
    def from_pretrained(
        cls, model_name: str, *, endpoint: str | list[str], config: ClientConfig | None = None
    ) -> "SwarmModelForCausalLM":
        """Join the swarm at `endpoint` and load the ends of the model."""
        client = LLMasOS(endpoint, config=config)
        client.__enter__()
        try:
            return cls(client, model_name, client.wait(client.asynchronous.generator(model_name)))
        except BaseException:
            client.close()
            raise

    @property
    def device(self) -> torch.device:
        """Where its inputs and scores are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What its scores are."""
        return torch.float32

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return self._generator.tokenizer

    def close(self) -> None:
        """Leave the swarm."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,  # (batch, tokens)
        attention_mask: torch.Tensor | None = None,  # (batch, tokens); zeros for padding on the left
        past_key_values: SwarmCache | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Scores behind the last `logits_to_keep` tokens (0 for all): logits of (batch, kept, vocab).

        `input_ids` are whole texts, whatever `past_key_values` hold. Raises UsageError for an option that cannot be
        honoured. Behind padding the logits are zeros.
        """
        wanted = {name for name, value in options.items() if value not in (None, False)} - {"use_cache", "return_dict"}
        if wanted:
            raise UsageError(f"a model in the swarm cannot honour {', '.join(sorted(wanted))}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        texts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        if any(not text for text in texts) or bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise UsageError("each row needs a text, with its padding on the left")
        cache = past_key_values or SwarmCache(self._client, self._model_name)
        kept = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        try:
            rows = self._client.wait(self._score(cache, texts, kept))
        finally:
            if past_key_values is None:
                self._client.wait(cache.close())
        logits = torch.zeros(len(texts), kept, rows[0].shape[1])
        for into, scores in zip(logits, rows, strict=True):
            into[kept - len(scores) :] = scores
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    async def _score(self, cache: SwarmCache, texts: list[list[int]], kept: int) -> list[torch.Tensor]:
        longest = max(map(len, texts))
        dialogues = [await cache.dialogue(row, longest) for row in range(len(texts))]
        return await asyncio.gather(
            *(
                self._generator.logits(dialogue, text, min(kept, len(text)))
                for dialogue, text in zip(dialogues, texts, strict=True)
            )
        )

    # --- what transformers' generation asks a model for --------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, **options: Any) -> Any:
        """See `transformers.GenerationMixin.generate`."""
        cache = SwarmCache(self._client, self._model_name)
        try:
            return super().generate(inputs, past_key_values=cache, **options)
        finally:
            self._client.wait(cache.close())

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SwarmCache | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Whole texts; only the last scores are of use."""
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "logits_to_keep": logits_to_keep or 1,
        }
