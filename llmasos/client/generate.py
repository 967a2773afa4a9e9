"""From a prompt to a text: tokenize, embed, send through a session, sample, decode.

The embedding, the final norm and the head stay with the client: token ids and text never leave it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from llmasos.blocks.ends import ModelEnds
from llmasos.blocks.registry import ModelSpec
from llmasos.blocks.sampling import Sampler, SamplingParams
from llmasos.blocks.tensors import from_torch, to_torch
from llmasos.client.session import Session
from llmasos.client.text import Detokenizer, StopText
from llmasos.errors import MissingBlocksError, UsageError

T = TypeVar("T")

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate. Lengths are in tokens; `max_length` counts the prompt, as in transformers.

    Raises UsageError for lengths that cannot be.
    """

    prompt: str
    max_length: int | None = None
    max_new_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    return_full_text: bool = False

    DEFAULT_NEW_TOKENS = 64

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_new_tokens is not None:
            raise UsageError("max_length and max_new_tokens are both given", hint="give one of them")
        for name in ("max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} is {value!r}: it must be a whole number above zero")
        if any(not text for text in self.stop):
            raise UsageError("a stop text is empty: it would stop before the first token")

    def new_tokens(self, prompt_tokens: int, context_tokens: int) -> int:
        """How many tokens may be generated behind a prompt. Raises UsageError when the context has no room."""
        if prompt_tokens >= context_tokens:
            raise UsageError(
                f"the prompt has {prompt_tokens} tokens, the context of the model {context_tokens}",
                hint="shorten the prompt: at least one position must be left for the answer",
            )
        if self.max_length is not None:
            if self.max_length <= prompt_tokens:
                raise UsageError(
                    f"max_length is {self.max_length}, but the prompt alone has {prompt_tokens} tokens",
                    hint=f"max_length counts the prompt: give at least {prompt_tokens + 1}, or use max_new_tokens",
                )
            return min(self.max_length, context_tokens) - prompt_tokens
        wanted = self.max_new_tokens if self.max_new_tokens is not None else self.DEFAULT_NEW_TOKENS
        return min(wanted, context_tokens - prompt_tokens)


@dataclass(frozen=True, slots=True)
class RoutedHop:
    """A peer of the route, and the blocks it computed."""

    peer: str
    blocks: str


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation. `text` is the completion (behind the prompt, if that was asked for)."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    route: tuple[RoutedHop, ...]
    time_to_first_token_s: float
    tokens_per_s: float
    failovers: int


@dataclass(slots=True)
class Dialogue:
    """A session, and the tokens whose rows it holds."""

    session: Session
    held: list[int] = field(default_factory=list)

    def keep_common(self, ids: Sequence[int]) -> None:
        """Forget what a new prompt does not share: the session is rolled back to there by its next step."""
        common = next((n for n, (a, b) in enumerate(zip(self.held, ids, strict=False)) if a != b), None)
        del self.held[min(len(self.held), len(ids)) if common is None else common :]


class Generator:
    """The model's ends on this machine: what turns text into rows and rows into text.

    Heavy calls run on one thread of its own, so that the event loop of a process with many generations stays free.
    """

    def __init__(self, spec: ModelSpec, ends: ModelEnds, tokenizer: Any) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self._ends = ends
        self._thread = ThreadPoolExecutor(1, "model-ends")

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    async def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens that the model wants. Raises UsageError for no tokens."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is not valid text: {error.reason} at character {error.start}") from error
        ids: list[int] = await self._on_thread(lambda: self.tokenizer(text)["input_ids"])
        if not ids:
            raise UsageError("the prompt is empty, and this model has no token to begin with", hint="write a prompt")
        return ids

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that the model's own chat template makes of a conversation. Raises UsageError without one."""
        if not self.has_chat_template:
            raise UsageError(f"{self.spec.name} has no chat template", hint="use generate_text with a plain prompt")
        prompt: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return prompt

    def close(self) -> None:
        """Let the thread go."""
        self._thread.shutdown()

    async def run(
        self, request: GenerationRequest, dialogue: Dialogue, prompt_ids: Sequence[int], new_tokens: int
    ) -> AsyncIterator[str | Generation]:
        """Generate behind `prompt_ids`: pieces of text, and at last the whole Generation.

        What the dialogue holds of the prompt already is not sent again.
        """
        loop = asyncio.get_running_loop()
        begin = loop.time()
        sampler = Sampler(request.sampling)
        text = StopText(Detokenizer(self.tokenizer, prompt_ids), request.stop)
        ids = list(prompt_ids)
        first_token_at = begin
        reason: FinishReason = "length"
        dialogue.keep_common(ids)
        try:
            while len(ids) - len(prompt_ids) < new_tokens:
                token = await self._next_token(dialogue, ids, sampler)
                if len(ids) == len(prompt_ids):
                    first_token_at = loop.time()
                ids.append(token)
                if token in self.spec.eos_token_ids:
                    reason = "stop"
                    break
                if piece := text.add(token):
                    yield piece
                if text.stopped:
                    reason = "stop"
                    break
        except MissingBlocksError as error:
            error.generated = text.text
            raise
        if piece := text.finish():
            yield piece
        generated = ids[len(prompt_ids) :]
        decode_s = loop.time() - first_token_at
        yield Generation(
            text=(request.prompt if request.return_full_text else "") + text.text,
            token_ids=tuple(generated),
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(generated),
            finish_reason=reason,
            route=tuple(RoutedHop(hop.peer, str(hop.span)) for hop in dialogue.session.route.hops),
            time_to_first_token_s=first_token_at - begin,
            tokens_per_s=(len(generated) - 1) / decode_s if len(generated) > 1 and decode_s > 0 else 0.0,
            failovers=dialogue.session.failovers,
        )

    async def _next_token(self, dialogue: Dialogue, ids: Sequence[int], sampler: Sampler) -> int:
        """The token behind `ids`: what is not held yet goes through the blocks, and its last row is sampled."""
        held = min(len(dialogue.held), len(ids) - 1)
        rows = await self._on_thread(lambda: from_torch(self._ends.embed(ids[held:], held)))
        last = await dialogue.session.forward(rows, position=held, keep=1)
        dialogue.held[held:] = ids[held:]
        return await self._on_thread(lambda: sampler(ids, self._logits(to_torch(last))))

    def _logits(self, last: torch.Tensor) -> torch.Tensor:
        return self._ends.logits(last)[0]  # (1, hidden) -> (vocab,)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
