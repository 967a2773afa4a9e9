"""From a prompt to a text: tokenize, embed, send through a session, sample, decode.

The embedding, the final norm and the head stay with the client: token ids and text never leave it.
"""

import asyncio
import secrets
from array import array
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError

from llmasos.blocks.ends import ModelEnds
from llmasos.blocks.grammar import Grammars
from llmasos.blocks.registry import ModelSpec
from llmasos.blocks.sampling import Sampler, Scored, score
from llmasos.blocks.tensors import from_torch
from llmasos.client.choice import Chooser
from llmasos.client.draft import DraftModel, DraftText
from llmasos.client.generation import FinishReason, Generation, GenerationRequest, Piece, PromptScores, RoutedHop
from llmasos.client.head import MAX_ROWS, SharedHead
from llmasos.client.session import Session
from llmasos.client.speculation import Speculator
from llmasos.client.text import Detokenizer, StopText
from llmasos.config import MAX_PREFIX_PAGES, PREFIX_PAGE_TOKENS
from llmasos.errors import MissingBlocksError, UsageError
from llmasos.wire import Tensor

T = TypeVar("T")

TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""A template is a program of the model's makers: roles in an order that it does not expect make it fail anyhow."""


@dataclass(slots=True)
class Dialogue:
    """A session, and the tokens whose rows it holds."""

    session: Session
    held: list[int] = field(default_factory=list)

    def keep_common(self, ids: Sequence[int]) -> None:
        """Forget what a new prompt does not share: the session is rolled back to there by its next step."""
        common = next((n for n, (a, b) in enumerate(zip(self.held, ids, strict=False)) if a != b), None)
        del self.held[min(len(self.held), len(ids)) if common is None else common :]


class _Thread(ThreadPoolExecutor):
    """One thread; whoever comes when it has been let go learns what that means."""

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        try:
            return super().submit(work, *args, **kwargs)
        except RuntimeError as error:
            raise UsageError("the client was closed before the text was whole") from error


class Generator:
    """The model's ends on this machine: what turns text into rows and rows into text.

    Heavy calls run on one thread of its own, so that the event loop of a process with many generations stays free.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ends: ModelEnds,
        tokenizer: Any,
        *,
        speculate: bool = True,
        draft: DraftModel | None = None,
    ) -> None:
        self.spec = spec
        self._speculate = speculate
        self._draft = draft
        self.tokenizer = tokenizer
        self._ends = ends
        self._grammars = Grammars(tokenizer, ends.vocab_size, spec.eos_token_ids)
        self._thread = _Thread(1, "model-ends")
        self._head = SharedHead(ends, self._thread)
        self._secret = secrets.token_bytes(16)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The token ids of a text, with the special tokens that the model wants. Raises UsageError for no tokens."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is not valid text: {error.reason} at character {error.start}") from error
        ids: list[int] = await self._on_thread(lambda: self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if not ids:
            raise UsageError("the prompt is empty, and this model has no token to begin with", hint="write a prompt")
        return ids

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """The prompt that the model's own chat template makes of a conversation. Raises UsageError without one.

        The template writes the special tokens itself: encode it with `special=False`.
        """
        if not self.has_chat_template:
            raise UsageError(f"{self.spec.name} has no chat template", hint="use generate_text with a plain prompt")
        try:
            prompt: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TEMPLATE_FAILURES as error:
            raise UsageError(f"the chat template of {self.spec.name} refuses the conversation: {error}") from error
        return prompt

    def prefix_keys(self, ids: Sequence[int]) -> list[bytes]:
        """A name for each page of a prompt that stands for all tokens up to its end; its last token is in none.

        They are made with a secret of this process: who sees them learns which prompts begin alike, not what they say.
        """
        keys: list[bytes] = []
        for page in range(min((len(ids) - 1) // PREFIX_PAGE_TOKENS, MAX_PREFIX_PAGES)):
            tokens = array("I", ids[page * PREFIX_PAGE_TOKENS : (page + 1) * PREFIX_PAGE_TOKENS]).tobytes()
            before = keys[-1] if keys else b""
            keys.append(blake2b(before + tokens, key=self._secret, digest_size=16).digest())
        return keys

    async def begin(self, session: Session, ids: Sequence[int]) -> Dialogue:
        """A dialogue on a session that was opened with the `prefix_keys` of `ids`: what all hops hold is not sent."""
        held = list(ids[: session.prefix_tokens])
        if held:
            session.begin_with(await self._embed(held, 0))
        return Dialogue(session, held)

    def close(self) -> None:
        """Let the thread go."""
        self._thread.shutdown()
        if self._draft is not None:
            self._draft.close()

    async def run(
        self, request: GenerationRequest, dialogue: Dialogue, prompt_ids: Sequence[int], new_tokens: int
    ) -> AsyncIterator[str | Generation]:
        """Generate behind `prompt_ids`: pieces of text, and at last the whole Generation.

        What the dialogue holds of the prompt already is not sent again.
        """
        async for event in self.events(request, dialogue, prompt_ids, new_tokens):
            if isinstance(event, Generation):
                yield event
            elif isinstance(event, Piece) and event.text:
                yield event.text

    async def events(
        self, request: GenerationRequest, dialogue: Dialogue, prompt_ids: Sequence[int], new_tokens: int
    ) -> AsyncGenerator[PromptScores | Piece | Generation, None]:
        """The same with scores. With `new_tokens` 0 the prompt is scored and nothing generated."""
        # 1. What can be refused before the swarm is asked.
        self._check_tokens(request, prompt_ids)
        grammar = None
        if (schema := request.json_schema) is not None:
            grammar = await self._on_thread(lambda: self._grammars.start(schema))
        loop = asyncio.get_running_loop()
        begin = loop.time()
        tracer = dialogue.session.tracer if request.trace else None
        if tracer is not None:
            tracer.begin()
        sampler = Sampler(request.sampling, len(prompt_ids))
        chooser = Chooser(self._ends, self.spec.eos_token_ids, sampler, grammar, request.logprobs)
        text = StopText(Detokenizer(self.tokenizer, prompt_ids), request.stop)
        ids = list(prompt_ids)
        first_token_at = begin
        reason: FinishReason = "length"
        waiting: list[tuple[Scored, int]] = []  # scored tokens whose text is held back, and where it begins
        # 2. The prompt.
        chosen: deque[Scored] = deque()  # by the last step: it brings several tokens where guesses come true
        speculator = self._speculator(ids)
        if request.score_prompt:
            dialogue.held.clear()
            row, scores = await self._score_prompt(dialogue, ids, request.logprobs or 0)
            chosen.extend(await self._head.score(row, lambda logits: chooser.choose(ids, (), logits)))
            yield PromptScores(tuple(scores))
        else:
            dialogue.keep_common(ids)
        # 3. Token by token.
        try:
            while (room := len(prompt_ids) + new_tokens - len(ids)) > 0:
                if not chosen:
                    chosen.extend(await self._step(dialogue, ids, chooser, speculator, room - 1))
                if len(ids) == len(prompt_ids):
                    first_token_at = loop.time()
                scored = chosen.popleft()
                ids.append(scored.token)
                if scored.token in self.spec.eos_token_ids:
                    reason = "stop"
                    break
                if request.logprobs is not None:
                    waiting.append((scored, text.decoded))
                if piece := text.add(scored.token):
                    yield _piece(piece, waiting, len(text.text))
                if text.stopped or (chooser.complete and not chosen):
                    reason = "stop"
                    break
        except MissingBlocksError as error:
            error.generated = text.text
            raise
        # 4. What was held back, and the sum of it all.
        piece = text.finish()
        if piece or (waiting and not text.stopped):
            yield _piece(piece, waiting, len(text.text) + 1)
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
            trace=tracer.trace() if tracer is not None else None,
        )

    async def logits(self, dialogue: Dialogue, ids: Sequence[int], keep: int) -> torch.Tensor:
        """Scores behind each of the last `keep` tokens of `ids`, (keep, vocab). Only what is not held is computed."""
        dialogue.keep_common(ids)
        held = min(len(dialogue.held), len(ids) - keep)
        rows = await self._forward(dialogue, held, ids[held:], keep)
        parts = [rows.rows(first, min(first + MAX_ROWS, keep)) for first in range(0, keep, MAX_ROWS)]
        return torch.cat([await self._head.score(part, lambda logits: logits) for part in parts])

    def _check_tokens(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> None:
        size = self._ends.vocab_size
        for token in prompt_ids:
            if not 0 <= token < size:
                raise UsageError(f"the prompt has token {token}, which is not in the vocabulary of {size}")
        for token, _ in request.sampling.logit_bias:
            if token >= size:
                raise UsageError(f"logit_bias names token {token}, which is not in the vocabulary of {size}")

    async def _step(
        self, dialogue: Dialogue, ids: Sequence[int], chooser: Chooser, speculator: Speculator, room: int
    ) -> list[Scored]:
        """The next tokens: one, and one more for each guess that came true.

        A step carries what the session does not hold yet, and up to `room` guesses behind it.
        """
        held = dialogue.held
        del held[len(ids) - 1 :]  # a wrong guess is rolled back
        decoding = len(held) == len(ids) - 1
        begin = asyncio.get_running_loop().time()
        guesses: list[int] = []
        if decoding and self._speculate:
            guesses = await self._guess(lambda: speculator.propose(room))
        with self._head.expecting():
            embedded = chooser.last if decoding and not guesses else None
            rows = await self._forward(dialogue, len(held), [*ids[len(held) :], *guesses], 1 + len(guesses), embedded)
            chosen = await self._head.score(rows, lambda logits: chooser.choose(ids, guesses, logits))
        if decoding:
            speculator.took(asyncio.get_running_loop().time() - begin, len(guesses), len(chosen) - 1)
        speculator.extend(scored.token for scored in chosen)
        return chosen

    def _speculator(self, prompt_ids: Sequence[int]) -> Speculator:
        if self._draft is None or not self._speculate:
            return Speculator(prompt_ids)
        text = DraftText(self._draft)
        speculator = Speculator(prompt_ids, text)
        self._draft.thread.submit(text.read)
        return speculator

    async def _guess(self, propose: Callable[[], list[int]]) -> list[int]:
        """On the draft model's thread, where there is one."""
        if self._draft is None:
            return propose()
        return await asyncio.get_running_loop().run_in_executor(self._draft.thread, propose)

    async def _forward(
        self, dialogue: Dialogue, position: int, tokens: Sequence[int], keep: int, embedded: Tensor | None = None
    ) -> Tensor:
        """Send `tokens` through all blocks, `embedded` if they are already: the last `keep` rows, (keep, hidden)."""
        rows = await self._embed(tokens, position) if embedded is None else embedded
        last = await dialogue.session.forward(rows, position=position, keep=keep)
        dialogue.held[position:] = tokens
        return last

    async def _score_prompt(self, dialogue: Dialogue, ids: Sequence[int], top: int) -> tuple[Tensor, list[Scored]]:
        """The last row of the prompt, and how likely each of its tokens was behind those before it."""
        rows = await self._forward(dialogue, 0, ids, keep=len(ids))
        scores = [Scored(ids[0], None)]
        for first in range(0, len(ids) - 1, MAX_ROWS):
            last = min(first + MAX_ROWS, len(ids) - 1)
            behind = ids[first + 1 : last + 1]
            scores += await self._head.score(rows.rows(first, last), partial(score, tokens=behind, top=top))
        return rows.rows(len(ids) - 1, len(ids)), scores

    async def _embed(self, ids: Sequence[int], position: int) -> Tensor:
        """(tokens, hidden)"""
        return await self._on_thread(lambda: from_torch(self._ends.embed(ids, position)))

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _piece(text: str, waiting: list[tuple[Scored, int]], end: int) -> Piece:
    """A piece with the tokens that begin before `end`; they wait no longer."""
    count = next((n for n, (_, offset) in enumerate(waiting) if offset >= end), len(waiting))
    taken = waiting[:count]
    del waiting[:count]
    return Piece(text, tuple(scored for scored, _ in taken), tuple(offset for _, offset in taken))
