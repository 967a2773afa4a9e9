"""An answer over HTTP: in one piece, or as server-sent events while the texts are written."""

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from llmasos.client.gateway_metrics import Metrics
from llmasos.client.gateway_texts import Event, Texts
from llmasos.client.generation import Generation, Piece, PromptScores
from llmasos.client.openai_answers import Choice, Head, TokenScore, ToolCalls, part_of_choice, usage, whole_choice
from llmasos.client.openai_fields import ApiError, as_api_error, error_body
from llmasos.config import GatewayConfig
from llmasos.errors import LLMasOSError, short_id

log = logging.getLogger(__name__)

WAITING_EVERY_S = 2.0
"""How often a client is told that its text waits for lost blocks."""

EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}


@dataclass(slots=True)
class _Progress:
    """How far the answer has come with one text."""

    choice: Choice
    parser: ToolCalls | None
    begun: bool = False  # its first event has been seen
    failovers: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Any] | None = None


class Answer:
    """What becomes of a request's texts."""

    def __init__(self, texts: Texts, head: Head, config: GatewayConfig, metrics: Metrics, *, calls: bool) -> None:
        self.streamed: web.StreamResponse | None = None
        """The answer, once all of it has been written as events."""
        self._texts = texts
        self._head = head
        self._config = config
        self._metrics = metrics
        self._began = asyncio.get_running_loop().time()
        self._completion_tokens = 0
        self._progress = [
            _Progress(Choice(), ToolCalls(f"call_{head.id[-12:]}_{index}") if calls else None)
            for index in range(texts.count)
        ]

    # --- in one piece ------------------------------------------------------------------------------------------------

    async def in_one_piece(self) -> dict[str, Any]:
        """The whole answer. Raises what any of the texts raised."""
        left = self._texts.count
        while left:
            event = await self._texts.next()
            text, scores = self._take(event)
            choice = self._progress[event.index].choice
            choice.text += text
            choice.scores += scores
            left -= isinstance(event.what, Generation)
        scored = self._texts.options.logprobs is not None
        body = self._head.body(
            [whole_choice(self._head, n, progress.choice, scored=scored) for n, progress in enumerate(self._progress)],
            chunk=False,
        )
        body["usage"] = self._usage()
        return body | self._told(self._progress)

    # --- as a stream -------------------------------------------------------------------------------------------------

    async def as_stream(self, request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
        """Write events until all texts are finished. What fails before the first token is raised: no header is out."""
        first = await self._texts.next()
        if isinstance(first.what, LLMasOSError):
            raise first.what
        response = web.StreamResponse(headers=EVENT_STREAM | headers)
        await response.prepare(request)
        try:
            await self._write_events(response, first)
            self.streamed = response
        except LLMasOSError as error:
            await self._write(response, _data(error_body(as_api_error(error))))
        except ConnectionResetError:
            raise
        except Exception as error:  # headers are out: what went wrong here can only be told as an event
            log.error("a stream failed: %s: %s", type(error).__name__, error, exc_info=error)
            failed = ApiError("the gateway failed; its log says how", status=500, kind="server_error")
            await self._write(response, _data(error_body(failed)))
        await response.write_eof()
        return response

    async def _write_events(self, response: web.StreamResponse, first: Event) -> None:
        event, left = first, self._texts.count
        while True:
            await self._write(response, self._rerouted(event.index) + self._chunks(event))
            left -= isinstance(event.what, Generation)
            if not left:
                break
            event = await self._next(response)
        if self._texts.options.include_usage:
            await self._write(response, _data(self._head.body([], chunk=True) | {"usage": self._usage()}))
        await self._write(response, "data: [DONE]\n\n")

    async def _next(self, response: web.StreamResponse) -> Event:
        """The next event. Meanwhile comments: what a text waits for, or that the gateway is still there."""
        every_s = min(self._config.keep_alive_s, WAITING_EVERY_S)
        silent_s = 0.0
        while True:
            try:
                async with asyncio.timeout(every_s):
                    return await self._texts.next()
            except TimeoutError:
                silent_s += every_s
                waiting = next((live.waiting for live in self._texts.live.values() if live.waiting), None)
                if waiting is not None or silent_s >= self._config.keep_alive_s:
                    silent_s = 0.0
                    await self._write(response, f": {waiting or 'still at it'}\n\n")

    def _rerouted(self, index: int) -> str:
        """A comment when hops of this text have been replaced since its last event."""
        live, progress = self._texts.live[index], self._progress[index]
        if live.failovers == progress.failovers:
            return ""
        progress.failovers = live.failovers
        hops = " → ".join(f"{hop['blocks']} on {short_id(hop['peer'])}" for hop in live.route)
        return f": rerouted, choice {index} goes on through {hops}\n\n"

    def _chunks(self, event: Event) -> str:
        """What an event looks like to the client."""
        index, head = event.index, self._head
        progress = self._progress[index]
        lines = ""
        if head.chat and not progress.begun:
            lines += self._chunk([part_of_choice(head, index, "", first=True)])
        calls = len(progress.choice.calls)
        text, scores = self._take(event)
        if text or scores:
            lines += self._chunk([part_of_choice(head, index, text, scores=scores)])
        if new_calls := list(enumerate(progress.choice.calls))[calls:]:
            lines += self._chunk([part_of_choice(head, index, None, calls=new_calls)])
        if isinstance(event.what, Generation):
            last = part_of_choice(head, index, None, finish_reason=progress.choice.finish_reason)
            lines += self._chunk([last], self._told([progress]))
        return lines

    def _chunk(self, choices: list[dict[str, Any]], told: dict[str, Any] | None = None) -> str:
        body = self._head.body(choices, chunk=True)
        if self._texts.options.include_usage:
            body["usage"] = None
        return _data(body | (told or {}))

    async def _write(self, response: web.StreamResponse, lines: str) -> None:
        if not lines:
            return
        try:
            async with asyncio.timeout(self._config.write_timeout_s):
                await response.write(lines.encode())
        except TimeoutError:
            raise ConnectionResetError("the client takes nothing in") from None

    # --- both --------------------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> tuple[str, list[TokenScore]]:
        """The text and the scores that an event adds to its choice. Raises the error that it may be."""
        what, progress = event.what, self._progress[event.index]
        if isinstance(what, LLMasOSError):
            raise what
        before = ""
        if not progress.begun:
            progress.begun = True
            before = self._begin(event.index)
        match what:
            case PromptScores():
                return before, self._texts.prompt_scores(event.index, what)
            case Piece():
                text = what.text if progress.parser is None else progress.parser.add(what.text)
                scores = self._texts.scores(event.index, what)
            case Generation():
                text = "" if progress.parser is None else progress.parser.finish()
                scores = []
        if progress.parser is not None:
            progress.choice.calls = list(progress.parser.calls)
        if isinstance(what, Generation):
            self._end(progress, what)
            self._metrics.saw_step(self._texts.live[event.index].last_step)
        return before + text, scores

    def _begin(self, index: int) -> str:
        """A text has its first event; returns the prompt if that is to be repeated."""
        self._metrics.first_token_s.labels(self._head.model).observe(asyncio.get_running_loop().time() - self._began)
        return self._texts.prompt_of(index).text if self._texts.echo else ""

    def _end(self, progress: _Progress, result: Generation) -> None:
        model = self._head.model
        self._completion_tokens += result.completion_tokens
        progress.choice.finish_reason = "tool_calls" if progress.choice.calls else result.finish_reason
        progress.result |= result.as_json()
        progress.trace = progress.result.pop("trace", None)
        self._metrics.failovers.labels(model).inc(result.failovers)
        if result.tokens_per_s:
            self._metrics.token_s.labels(model).observe(1 / result.tokens_per_s)

    def _told(self, progress: Sequence[_Progress]) -> dict[str, Any]:
        """What the client asked to be told beside its texts, in fields that OpenAI does not have."""
        told: dict[str, Any] = {}
        if self._texts.trace in ("1", "route"):
            told["llmasos"] = {"texts": [entry.result for entry in progress]}
        if self._texts.trace == "1":
            told["llmasos_trace"] = [entry.trace for entry in progress]
        return told

    def _usage(self) -> dict[str, Any]:
        prompt_tokens = sum(len(prompt.ids) for prompt in self._texts.prompts)
        return usage(prompt_tokens, self._completion_tokens, self._texts.cached_tokens)


def _data(body: dict[str, Any]) -> str:
    """A server-sent event. JSON in ASCII: no character is ever cut in two, whatever stands between."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
