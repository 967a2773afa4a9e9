"""The texts of one request: each a session through the swarm, their events in one queue."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from llmasos.blocks.sampling import SamplingParams, Scored
from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.events import Event as SessionEvent
from llmasos.client.events import Rerouted
from llmasos.client.generate import Dialogue, Generator
from llmasos.client.generation import Generation, GenerationRequest, Piece, PromptScores
from llmasos.client.openai_answers import TokenScore
from llmasos.client.openai_api import Options
from llmasos.client.token_bytes import TokenBytes, offsets_of
from llmasos.client.trace import StepTime
from llmasos.errors import LLMasOSError, short_id

log = logging.getLogger(__name__)

EVENTS_AHEAD = 64
"""Events that may wait for a slow reader, before its texts wait for it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to go on with, as tokens too."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to the text `index`."""

    index: int
    what: PromptScores | Piece | Generation | LLMasOSError


@dataclass(slots=True)
class Live:
    """One text while it is being written; the page shows these."""

    model: str
    prompt_tokens: int
    began: float
    cached_tokens: int = 0
    """Of the prompt: every hop held them from an earlier session."""
    tokens: int = 0
    first_token_at: float | None = None
    dialogue: Dialogue | None = None
    done: bool = False
    cause: str = ""
    """Why it last left its route, until the page has been told."""

    @property
    def route(self) -> list[dict[str, str]]:
        """The hops that serve it now."""
        try:
            hops = self.dialogue.session.route.hops if self.dialogue is not None else ()
        except ValueError:  # it has none just now: all were lost, or it has ended
            hops = ()
        return [{"peer": hop.peer, "blocks": str(hop.span)} for hop in hops]

    @property
    def failovers(self) -> int:
        """Hops that were lost and replaced."""
        return self.dialogue.session.failovers if self.dialogue is not None else 0

    @property
    def waiting(self) -> str | None:
        """What it waits for, in words; None while it does not."""
        waiting = self.dialogue.session.waiting if self.dialogue is not None else None
        return str(waiting) if waiting is not None else None

    @property
    def last_step(self) -> StepTime | None:
        """What its latest step took on each hop."""
        tracer = self.dialogue.session.tracer if self.dialogue is not None else None
        return tracer.last() if tracer is not None else None

    def hear(self, event: SessionEvent) -> None:
        """What its session says beside the text."""
        if isinstance(event, Rerouted):
            self.cause = event.why


@dataclass(slots=True)
class Texts:
    """Runs a request's texts at once. An async context manager: leaving it ends every session, on every hop.

    `model` is the swarm's name of the model, `source` what its ends are loaded from. `on_failover` hears of a text
    and of the hops that it has lost; its route is the new one by then.
    """

    client: AsyncLLMasOS
    generator: Generator
    source: str
    model: str
    prompts: Sequence[Prompt]
    options: Options
    echo: bool
    new_tokens: Sequence[int]
    on_failover: Callable[[Live, list[dict[str, str]]], None]
    trace: str = ""
    """What the client wants to be told beside its texts: 1 for where the time went, route for how each came to be."""
    live: dict[int, Live] = field(default_factory=dict)
    _events: asyncio.Queue[Event] = field(default_factory=lambda: asyncio.Queue(EVENTS_AHEAD))
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many texts there are: `n` for each prompt, one prompt after the other."""
        return len(self.prompts) * self.options.n

    async def __aenter__(self) -> Self:
        """Start them all."""
        for index in range(self.count):
            self._tasks.append(asyncio.create_task(self._write(index), name=f"text {index}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def tokens_used(self) -> int:
        """Of prompts, and of what has been written so far."""
        return sum(len(prompt.ids) for prompt in self.prompts) + sum(live.tokens for live in self.live.values())

    @property
    def cached_tokens(self) -> int:
        """Of each prompt once, as its tokens are counted: what the first of its choices found computed already."""
        firsts = (self.live.get(index) for index in range(0, self.count, self.options.n))
        return sum(live.cached_tokens for live in firsts if live is not None)

    def prompt_of(self, index: int) -> Prompt:
        """What the text `index` goes on from."""
        return self.prompts[index // self.options.n]

    async def next(self) -> Event:
        """The next event of any of them."""
        return await self._events.get()

    def scores(self, index: int, piece: Piece) -> list[TokenScore]:
        """The scored tokens of a piece, as the interface shows them."""
        base = len(self.prompt_of(index).text) if self.echo else 0
        return self._shown(piece.scores, [base + offset for offset in piece.offsets])

    def prompt_scores(self, index: int, scored: PromptScores) -> list[TokenScore]:
        """The scored tokens of a prompt."""
        prompt = self.prompt_of(index)
        return self._shown(scored.scores, offsets_of(self.generator.tokenizer, prompt.ids))

    def _shown(self, scores: Sequence[Scored], offsets: Sequence[int]) -> list[TokenScore]:
        raw = TokenBytes(self.generator.tokenizer)

        def shown(token: int, logprob: float | None, top: tuple[TokenScore, ...] = (), offset: int = 0) -> TokenScore:
            held = raw(token)
            return TokenScore(held.decode(errors="replace"), held, logprob, top, offset)

        return [
            shown(one.token, one.logprob, tuple(shown(token, chance) for token, chance in one.top), offset)
            for one, offset in zip(scores, offsets, strict=True)
        ]

    async def _write(self, index: int) -> None:
        try:
            await self._generate(index)
        except LLMasOSError as error:
            await self._events.put(Event(index, error))
        except Exception as error:  # one text may fail in ways that nobody thought of; the client is told, the log how
            log.error("a text failed: %s: %s", type(error).__name__, error, exc_info=error)
            await self._events.put(Event(index, LLMasOSError("the gateway failed; its log says how")))

    async def _generate(self, index: int) -> None:
        prompt = self.prompt_of(index)
        new_tokens = self.new_tokens[index // self.options.n]
        live = Live(self.model, len(prompt.ids), asyncio.get_running_loop().time())
        self.live[index] = live
        request = self._request(prompt, index)
        kv_tokens = max(len(prompt.ids) + new_tokens, 1)
        try:
            async with (
                self.client.dialogue(
                    self.source,
                    kv_tokens,
                    new_tokens=max(new_tokens, 1),
                    prompt_ids=prompt.ids,
                    on_event=live.hear,
                    trace=True,
                ) as dialogue,
                aclosing(self.generator.events(request, dialogue, prompt.ids, new_tokens)) as events,
            ):
                live.dialogue = dialogue
                route = live.route
                if not request.score_prompt:  # else it is computed anew
                    live.cached_tokens = len(dialogue.held)
                log.info(
                    "choice %d goes through %s",
                    index,
                    ", ".join(f"{hop['blocks']} on {short_id(hop['peer'])}" for hop in route),
                )
                async for event in events:
                    if live.failovers and (lost := [hop for hop in route if hop not in live.route]):
                        self.on_failover(live, lost)
                    route = live.route
                    if live.first_token_at is None:
                        live.first_token_at = asyncio.get_running_loop().time()
                    if isinstance(event, Generation):
                        live.tokens = event.completion_tokens
                    else:
                        live.tokens = max(len(dialogue.held) - len(prompt.ids), 0)
                    await self._events.put(Event(index, event))
        finally:
            live.done = True

    def _request(self, prompt: Prompt, index: int) -> GenerationRequest:
        options = self.options
        sampling = SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            min_p=options.min_p,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=options.logit_bias,
        )
        if options.seed is not None:  # choices of one prompt differ, each repeatable
            sampling = replace(sampling, seed=(options.seed + index % options.n) % 2**63)
        return GenerationRequest(
            prompt=prompt.text,
            sampling=sampling,
            stop=options.stop,
            logprobs=options.logprobs,
            score_prompt=self.echo and options.logprobs is not None,
            json_schema=options.json_schema,
            trace=self.trace == "1",
        )
