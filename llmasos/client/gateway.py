"""The front door: a swarm behind the HTTP interface that OpenAI's clients speak, and a page that shows it.

A request passes the door (`gateway_door`: its name, its key, errors as JSON), is read into a frozen dataclass
(`openai_api`), waits for a place (`gateway_admission`), becomes one session a text (`gateway_texts`), and is answered
in one piece or as events (`gateway_answer`). Nothing is sent before the first token is there, so that whatever fails
until then has its own status; a client that goes away takes its sessions with it, on every hop.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from llmasos.blocks.hub import looks_like_hub_id
from llmasos.blocks.registry import ALIASES, resolve
from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.gateway_admission import Admission
from llmasos.client.gateway_answer import Answer
from llmasos.client.gateway_door import ID, KEY, TRACE, Door
from llmasos.client.gateway_keys import load_keys
from llmasos.client.gateway_listen import Runner
from llmasos.client.gateway_metrics import Metrics
from llmasos.client.gateway_openapi import document
from llmasos.client.gateway_texts import Prompt, Texts
from llmasos.client.gateway_watch import Watch
from llmasos.client.generate import Generator
from llmasos.client.openai_answers import CALL_BEGINS, Head
from llmasos.client.openai_api import Options, parse_chat, parse_completion, parse_detokenize, parse_tokenize
from llmasos.client.openai_fields import ApiError, Fields, parse_body, shown
from llmasos.config import ClientConfig, GatewayConfig
from llmasos.console import cannot_listen
from llmasos.errors import MissingBlocksError, UsageError
from llmasos.routing.view import Checkpoint, Numerics
from llmasos.tasks import TaskSet

log = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
}
"""The page loads its own script and style and speaks to its own gateway; nothing else, whatever a peer calls itself."""


class Gateway:
    """One gateway over a client that has joined. `app` is the application that aiohttp serves."""

    def __init__(self, client: AsyncLLMasOS, config: GatewayConfig, numbers: ClientConfig) -> None:
        """`numbers` are those that the client asks for: peers with others are of no use here."""
        self.metrics = Metrics()
        self._numbers = numbers
        self.admission = Admission(
            config.max_running,
            config.max_waiting,
            config.max_wait_s,
            lambda why: self.metrics.refused.labels(why).inc(),
        )
        self.watch = Watch(client, self.metrics, self.admission)
        self._client = client
        self._config = config
        self._created = int(time.time())
        self._sources: dict[str, str] = {}  # the swarm's name of a model -> what to load it from
        self._checkpoints: dict[str, Checkpoint] = {}  # of those whose source was read
        self._door = Door(config, load_keys(config.api_key_file) if config.api_key_file else None, self.metrics)

    def app(self) -> web.Application:
        """The application. Serve it with `handler_cancellation`, or sessions outlive the clients that wanted them."""
        app = web.Application(middlewares=[self._door.middleware()], client_max_size=self._config.max_body_bytes)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get(r"/web/{name:[\w.-]+}", self._page),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics_page),
                web.get("/openapi.json", self._openapi),
                web.get("/api/swarm", self._swarm),
                web.get("/api/activity", self._activity),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completions),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
                web.get("/tokenizer_info", self._tokenizer_info),
            ]
        )
        app.cleanup_ctx.append(self._background)
        return app

    async def _background(self, app: web.Application) -> AsyncIterator[None]:
        for source in self._config.models:
            spec = await asyncio.to_thread(resolve, source)
            self._sources[spec.name] = source
            self._checkpoints[spec.name] = Checkpoint(spec.digest, spec.blocks)
        tasks = TaskSet()
        tasks.spawn(self.watch.run(), "samples of the gateway")
        yield
        await tasks.close()

    # --- generation --------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        wanted = parse_chat(await _body(request))
        generator = await self._generator(request, wanted.model)
        if not generator.has_chat_template:
            raise ApiError(f"{wanted.model} has no chat template: use /v1/completions", param="model")
        if wanted.tools and not _takes_tools(generator):
            raise ApiError(f"the chat template of {wanted.model} knows no tools", param="tools", code="unsupported")
        try:
            text = generator.chat_prompt(wanted.messages, wanted.tools)
        except UsageError as error:
            raise ApiError(error.message, param="messages") from error
        ids = await generator.encode(text, special=False)
        head = Head(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), wanted.model, chat=True)
        return await self._answer(
            request, head, generator, [Prompt("", tuple(ids))], wanted.options, calls=bool(wanted.tools)
        )

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        wanted = parse_completion(await _body(request))
        generator = await self._generator(request, wanted.model)
        prompts = [await _prompt(generator, prompt, wanted.echo) for prompt in wanted.prompts]
        head = Head(f"cmpl-{secrets.token_hex(12)}", int(time.time()), wanted.model, chat=False)
        return await self._answer(request, head, generator, prompts, wanted.options, echo=wanted.echo)

    async def _answer(
        self,
        request: web.Request,
        head: Head,
        generator: Generator,
        prompts: Sequence[Prompt],
        options: Options,
        *,
        echo: bool = False,
        calls: bool = False,
    ) -> web.StreamResponse:
        """Admit a request, write its texts, answer."""
        field = "messages" if head.chat else "prompt"
        default = self._config.default_chat_tokens if head.chat else self._config.default_completion_tokens
        new_tokens = [_room(generator, prompt, options, field, default) for prompt in prompts]
        _check_tokens(generator, prompts, options)
        texts = Texts(
            client=self._client,
            generator=generator,
            source=self._source(head.model),
            model=head.model,
            prompts=prompts,
            options=options,
            echo=echo,
            new_tokens=new_tokens,
            on_failover=self.watch.failed_over,
            trace=_trace(request),
        )
        name = f"{request[ID]}.{head.id[-6:]}"
        async with self.admission.enter(request[KEY], texts.count):
            self.watch.texts[name] = texts
            answer = Answer(texts, head, self._config, self.metrics, calls=calls)
            try:
                async with texts:
                    if options.stream:
                        return await answer.as_stream(request, self._door.headers(request))
                    return web.json_response(await answer.in_one_piece())
            except (asyncio.CancelledError, ConnectionResetError) as error:
                if answer.streamed is not None:  # who has all of it need not wait until we have tidied up
                    return answer.streamed
                if isinstance(error, asyncio.CancelledError):
                    self.metrics.cancelled.inc()
                raise
            finally:
                self.watch.finished(name)
                self.admission.spent(request[KEY], texts.tokens_used)
                written = sum(live.tokens for live in texts.live.values())
                self.metrics.tokens.labels(head.model, "prompt").inc(texts.tokens_used - written)
                self.metrics.tokens.labels(head.model, "completion").inc(written)
                self.metrics.cached.labels(head.model).inc(texts.cached_tokens)

    # --- models ------------------------------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.Response:
        shown = [self._shown(name) for name in await self._usable(request)]
        return web.json_response({"object": "list", "data": shown})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if name not in await self._usable(request):
            raise _unknown(name, await self._usable(request))
        return web.json_response(self._shown(name))

    def _shown(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "llmasos"}

    async def _usable(self, request: web.Request) -> list[str]:
        """The models whose blocks all have a peer, that this gateway can load, and that the key may use."""
        found = await self.watch.status(self._config.status_age_s)
        names = [model["model"] for model in found["models"] if not self._missing(model["model"])]
        allowed = request[KEY].models
        return [name for name in names if self._source(name) and (not allowed or name in allowed)]

    def _missing(self, name: str) -> list[str]:
        """The blocks of our checkpoint of a model that no peer serves in the numbers that are asked for here.

        Anybody can announce another one under its name, in any number of copies. Where ours is not known yet, it is the
        one that lacks the least.
        """
        known, view = self._checkpoints.get(name), self._client.view
        numbers = Numerics(self._numbers.dtype, self._numbers.quantization)
        lacking = [view.lacking(name, each, numbers) for each in ([known] if known else view.checkpoints(name))]
        least = min(lacking, key=lambda spans: sum(map(len, spans)), default=None)
        return ["auto"] if least is None else [str(gap) for gap in least]

    def _source(self, name: str) -> str:
        """What to load a model of the swarm from; empty for a name that means nothing here."""
        # Peers choose the names: one that is a path of ours must not make us read there.
        if name in self._sources:
            return self._sources[name]
        return name if name in ALIASES or (looks_like_hub_id(name) and not Path(name).exists()) else ""

    async def _generator(self, request: web.Request, name: str) -> Generator:
        """The ends of a model that can be used now. Raises ApiError 404, MissingBlocksError."""
        usable = await self._usable(request)
        if name not in usable:
            allowed = request[KEY].models
            for model in (await self.watch.status(self._config.status_age_s))["models"]:
                if model["model"] == name and self._source(name) and (not allowed or name in allowed):
                    raise self._why(name, model)
            raise _unknown(name, usable)
        generator = await self._client.generator(self._source(name))
        self._checkpoints[name] = Checkpoint(generator.spec.digest, generator.spec.blocks)
        return generator

    def _why(self, name: str, model: dict[str, Any]) -> MissingBlocksError:
        dtype, quantization = self._numbers.dtype, self._numbers.quantization
        wanted = dtype if quantization == "none" else f"{dtype} {quantization}"
        ours = self._checkpoints.get(name) in (None, self._client.view.checkpoint(name))
        others = f"others have, but not in {wanted}" if ours else "others have, but of another checkpoint"
        why = "" if model["missing"] else others
        return MissingBlocksError(name, self._missing(name), why=why).wanting(dtype, quantization)

    async def _generator_or_only(self, request: web.Request, name: str | None) -> Generator:
        """The same; without a name, of the first model there is."""
        if name is None:
            usable = await self._usable(request)
            if not usable:
                raise ApiError("no model has all of its blocks", status=503, kind="service_unavailable")
            name = usable[0]
        return await self._generator(request, name)

    async def _tokenize(self, request: web.Request) -> web.Response:
        wanted = parse_tokenize(await _body(request))
        generator = await self._generator_or_only(request, wanted.model)
        text = wanted.prompt if wanted.prompt is not None else generator.chat_prompt(wanted.messages)
        ids = await generator.encode(text, special=wanted.add_special_tokens) if text else []
        body = {"count": len(ids), "max_model_len": generator.spec.context_tokens, "tokens": ids}
        if wanted.return_token_strs:
            body["token_strs"] = generator.tokenizer.convert_ids_to_tokens(ids)
        return web.json_response(body)

    async def _detokenize(self, request: web.Request) -> web.Response:
        wanted = parse_detokenize(await _body(request))
        generator = await self._generator_or_only(request, wanted.model)
        _check_range(generator, wanted.tokens, "tokens")
        return web.json_response({"prompt": generator.tokenizer.decode(list(wanted.tokens))})

    async def _tokenizer_info(self, request: web.Request) -> web.Response:
        generator = await self._generator_or_only(request, request.query.get("model"))
        tokenizer = generator.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        body = {name: getattr(tokenizer, name, None) for name in names}
        body |= {
            "model": generator.spec.name,
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": generator.spec.vocab_size,
            "model_max_length": generator.spec.context_tokens,
        }
        return web.json_response(body)

    # --- the swarm ---------------------------------------------------------------------------------------------------

    async def _swarm(self, request: web.Request) -> web.Response:
        return web.json_response(await self.watch.status(self._config.status_age_s))

    async def _activity(self, request: web.Request) -> web.Response:
        return web.json_response(self.watch.activity())

    async def _health(self, request: web.Request) -> web.Response:
        alive = self._client.alive
        body = {"status": "ok" if alive else "failed", "running": self.admission.running}
        return web.json_response(body, status=200 if alive else 503)

    async def _metrics_page(self, request: web.Request) -> web.Response:
        self.metrics.running.set(self.admission.running)
        self.metrics.waiting.set(self.admission.waiting)
        return web.Response(body=self.metrics.page(), headers={"Content-Type": METRICS_TYPE})

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(document([] if self._config.api_key_file else await self._usable(request)))

    async def _page(self, request: web.Request) -> web.StreamResponse:
        path = WEB / request.match_info.get("name", "index.html")
        if not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path, headers=PAGE_HEADERS | self._door.headers(request))


async def serve(client: AsyncLLMasOS, config: GatewayConfig, numbers: ClientConfig) -> web.AppRunner:
    """Listen; the caller ends it with `cleanup()`. Raises UsageError for a port that is taken.

    `numbers` are those that the client asks for.
    """
    runner = Runner(Gateway(client, config, numbers).app())
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except OSError as error:
        await runner.cleanup()
        raise cannot_listen(config.host, config.port, error) from error
    return runner


async def _body(request: web.Request) -> Fields:
    if request.content_type != "application/json":
        # Also what keeps pages of strangers out: a browser asks before it sends JSON to another origin.
        raise ApiError("send the header Content-Type: application/json", status=415, code="unsupported_media_type")
    return parse_body(await request.read())


def _trace(request: web.Request) -> str:
    """What the client wants to be told beside its texts."""
    wanted = request.headers.get(TRACE, "")
    if wanted not in ("", "0", "1", "route"):
        raise ApiError(f"{TRACE} must be 1, route or 0, not {shown(wanted)}", param=TRACE)
    return wanted


def _unknown(name: str, usable: Sequence[str]) -> ApiError:
    there = f"there is {', '.join(usable)}" if usable else "no model has all of its blocks"
    return ApiError(f"the swarm serves no model {name!r}; {there}", param="model", status=404, code="model_not_found")


async def _prompt(generator: Generator, prompt: str | tuple[int, ...], echo: bool) -> Prompt:
    if isinstance(prompt, str):
        try:
            return Prompt(prompt, tuple(await generator.encode(prompt)))
        except UsageError as error:
            raise ApiError(error.message, param="prompt") from error
    _check_range(generator, prompt, "prompt")
    return Prompt(generator.tokenizer.decode(list(prompt), skip_special_tokens=True) if echo else "", prompt)


def _room(generator: Generator, prompt: Prompt, options: Options, field: str, default: int) -> int:
    """How many tokens may be written behind a prompt."""
    context, length = generator.spec.context_tokens, len(prompt.ids)
    wanted = options.max_tokens
    if length > context or (length == context and wanted != 0) or (wanted is not None and length + wanted > context):
        asked = f" and {wanted} more are asked for" if wanted is not None else ""
        raise ApiError(
            f"{generator.spec.name} has a context of {context} tokens; the {field} has {length}{asked}",
            param=field if length >= context else "max_tokens",
            code="context_length_exceeded",
        )
    return min(default, context - length) if wanted is None else wanted


def _check_tokens(generator: Generator, prompts: Sequence[Prompt], options: Options) -> None:
    for prompt in prompts:
        _check_range(generator, prompt.ids, "prompt")
    _check_range(generator, [token for token, _ in options.logit_bias], "logit_bias")


def _check_range(generator: Generator, tokens: Sequence[int], field: str) -> None:
    size = generator.spec.vocab_size
    if outside := [token for token in tokens if token >= size]:
        raise ApiError(f"token {outside[0]} is not in the vocabulary of {size}", param=field)


def _takes_tools(generator: Generator) -> bool:
    """Whether the template tells the model of tools, and has it call them in the way that we read."""
    template = generator.tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template)
    return "tools" in text and CALL_BEGINS in text
