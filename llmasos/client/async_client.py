"""The Python client: join a swarm, generate text through it."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from llmasos.blocks.ends import load_ends
from llmasos.blocks.registry import load_tokenizer, resolve
from llmasos.blocks.sampling import SamplingParams
from llmasos.blocks.tensors import is_finite
from llmasos.client import prompts
from llmasos.client.draft import DraftModel
from llmasos.client.events import OnEvent, ignore
from llmasos.client.generate import Dialogue, Generator
from llmasos.client.generation import Generation, GenerationRequest
from llmasos.client.http_client import HttpGateway
from llmasos.client.router import Router
from llmasos.client.session import Session
from llmasos.config import ClientConfig, NetworkConfig
from llmasos.errors import UsageError
from llmasos.logs import about
from llmasos.network import Network
from llmasos.p2p import P2PNetwork
from llmasos.routing.directory import Directory
from llmasos.routing.planner import RouteRequest
from llmasos.routing.view import SwarmView, status
from llmasos.wire import row_bytes

DEFAULT_MODEL = "smollm2"


class Options(TypedDict, total=False):
    """How to generate. The defaults are those of `generate_text`, save that the prompt is no part of the text.

    `trace` has the Generation say where the time went.
    """

    max_length: int | None
    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    return_full_text: bool
    trace: bool


def _request(
    prompt: str,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    return_full_text: bool = False,
    trace: bool = False,
) -> GenerationRequest:
    if not isinstance(prompt, str):
        raise UsageError(f"the prompt is a {type(prompt).__name__}, not a text")
    return GenerationRequest(
        prompt=prompt,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(temperature, top_p, top_k, repetition_penalty, seed),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        return_full_text=return_full_text,
        trace=trace,
    )


class AsyncLLMasOS:
    """A client of one swarm. An async context manager.

    `endpoint` is the multiaddr of any peer or bootstrap of the swarm, or several of them - or the http(s) address of a
    gateway, which may want an `api_key`. `network` replaces the libp2p node that the client would make for itself.
    `on_event` is told what happens to generations beside their text: lost peers, waiting for blocks to come back.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        *,
        config: ClientConfig | None = None,
        network: Network | None = None,
        seed: int | None = None,
        api_key: str | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self._on_event = on_event
        self._endpoints = (endpoint,) if isinstance(endpoint, str) else tuple(endpoint)
        if not self._endpoints or not all(self._endpoints):
            raise UsageError("no endpoint is given", hint="give the multiaddr that a peer prints when it is ready")
        urls = [address for address in self._endpoints if address.startswith(("http://", "https://"))]
        if urls and len(self._endpoints) > 1:
            raise UsageError("a gateway is one endpoint alone", hint=f"give {urls[0]}, or multiaddrs")
        if api_key is not None and not urls:
            raise UsageError("api_key is for gateways", hint="give the http(s) address of one as the endpoint")
        if urls and config not in (None, ClientConfig()):
            raise UsageError("config is for clients that join a swarm", hint="a gateway goes by its own")
        self._gateway = HttpGateway(urls[0], api_key) if urls else None
        self._config = config or ClientConfig()
        self._network = network
        self._rng = random.Random(secrets.randbits(64) if seed is None else seed)
        self._router: Router | None = None
        self._generators: dict[str, Generator] = {}
        self._loading = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Join the swarm. Raises SwarmUnreachableError when no endpoint answers."""
        if self._gateway is not None:
            try:
                await self._gateway.open()
            except BaseException:
                await self.close()
                raise
            return self
        if self._network is None:
            self._network = await P2PNetwork.create(NetworkConfig(listen=False))
        try:
            await self._network.join(self._endpoints)
        except BaseException:
            await self.close()
            raise
        self._router = Router(self._network, Directory(self._network), self._config, self._rng)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the swarm. May be called twice."""
        for generator in self._generators.values():
            generator.close()
        self._generators.clear()
        if self._gateway is not None:
            await self._gateway.close()
        router, self._router = self._router, None
        if router is not None:
            await router.close()
        network, self._network = self._network, None
        if network is not None:
            await network.close()

    # --- generation --------------------------------------------------------------------------------------------------

    async def generate_text(
        self,
        prompt: str,
        model_name: str = DEFAULT_MODEL,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        return_full_text: bool = True,
    ) -> str:
        """The prompt and what the model writes behind it (only that, without `return_full_text`).

        `max_length` counts the prompt, as in transformers. `temperature` 0 takes the likeliest token each time.
        """
        request = _request(
            prompt,
            max_length,
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            repetition_penalty,
            seed,
            stop,
            return_full_text,
        )
        return (await self._run(request, model_name)).text

    async def generate(self, prompt: str, model_name: str = DEFAULT_MODEL, **options: Unpack[Options]) -> Generation:
        """Like `generate_text`, with everything that is known about the generation."""
        return await self._run(_request(prompt, **options), model_name)

    async def stream_text(
        self, prompt: str, model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> AsyncIterator[str]:
        """The pieces of the completion as they come; never half a character."""
        async for piece in self.stream(prompt, model_name, **options):
            if isinstance(piece, str):
                yield piece

    async def stream(
        self, prompt: str, model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> AsyncIterator[str | Generation]:
        """The pieces of the completion as they come, and the whole Generation last."""
        async for piece in self._stream(_request(prompt, **options), model_name):
            yield piece

    async def generate_batch(
        self, prompts: Sequence[str], model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> list[Generation]:
        """All prompts at once, each in a session of its own: the router spreads them over the swarm's routes.

        The first that fails ends the others, and its error is raised.
        """
        requests = [_request(prompt, **options) for prompt in prompts]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(request, model_name)) for request in requests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # callers catch LLMasOSError, not a group of them
        return [task.result() for task in tasks]

    async def chat(
        self, messages: Sequence[dict[str, str]], model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> Generation:
        """The next turn of a conversation, by the model's own chat template."""
        if self._gateway is not None:
            return await _last(self._gateway.stream(_request("", **options), model_name, messages))
        generator = await self.generator(model_name)
        return await self._run(_request(generator.chat_prompt(messages), **options), model_name)

    async def translate(
        self, text: str, source: str, target: str, model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> str:
        """`text`, written in the language `source`, in the language `target`."""
        return await self._ask(prompts.translation(text, source, target), model_name, **options)

    async def answer(
        self,
        question: str,
        context: str | None = None,
        model_name: str = DEFAULT_MODEL,
        **options: Unpack[Options],
    ) -> str:
        """An answer to `question`, from `context` if there is one."""
        return await self._ask(prompts.answer(question, context), model_name, **options)

    async def generate_code(
        self, task: str, language: str = "Python", model_name: str = DEFAULT_MODEL, **options: Unpack[Options]
    ) -> str:
        """A program that does `task`."""
        return await self._ask(prompts.code(task, language), model_name, **options)

    # --- the swarm ---------------------------------------------------------------------------------------------------

    async def models(self) -> list[str]:
        """The models that some peer serves, whole or in part; from a gateway, those that are whole."""
        if self._gateway is not None:
            return await self._gateway.models()
        return await self._joined.directory.models()

    async def status(self) -> dict[str, Any]:
        """What the swarm serves: models, peers, coverage."""
        if self._gateway is not None:
            return await self._gateway.status()
        directory = self._joined.directory
        await directory.refresh_all()
        assert self._network is not None
        return status(self.view, self._network.now())

    @property
    def view(self) -> SwarmView:
        """What was looked up last; `status` looks. Not for a client of a gateway."""
        return self._joined.directory.view

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it joins, as it was told: multiaddrs, or the address of a gateway."""
        return self._endpoints

    @property
    def alive(self) -> bool:
        """Whether this client has its place in the swarm, and has not lost it for good."""
        return self._network is not None and not self._network.failed.is_set()

    async def wait_failed(self) -> None:
        """Until this client has lost its place in the swarm for good."""
        assert self._network is not None
        await self._network.failed.wait()

    def round_trips(self) -> dict[str, float]:
        """Seconds to each peer that this client has measured."""
        health = self._joined.health
        return {peer: health.rtt_s(peer) for peer in health if health.measured(peer)}

    def relayed(self) -> list[str]:
        """The peers that can be reached through a relay only, by what they announce."""
        records = [record for model in self.view.models() for record in self.view.peers(model)]
        return sorted({record.peer for record in records if record.relayed})

    # --- below the surface -------------------------------------------------------------------------------------------

    async def _stream(self, request: GenerationRequest, model_name: str) -> AsyncIterator[str | Generation]:
        if self._gateway is not None:
            async with aclosing(self._gateway.stream(request, model_name)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        generator = await self.generator(model_name)
        prompt_ids = await generator.encode(request.prompt)
        new_tokens = request.new_tokens(len(prompt_ids), generator.spec.context_tokens)
        kv_tokens = len(prompt_ids) + new_tokens
        async with self.dialogue(
            model_name, kv_tokens, new_tokens=new_tokens, prompt_ids=prompt_ids, trace=request.trace
        ) as dialogue:
            async for piece in generator.run(request, dialogue, prompt_ids, new_tokens):
                yield piece

    @asynccontextmanager
    async def dialogue(
        self,
        model_name: str,
        kv_tokens: int,
        *,
        new_tokens: int = 1,
        prompt_ids: Sequence[int] = (),
        on_event: OnEvent | None = None,
        trace: bool = False,
    ) -> AsyncIterator[Dialogue]:
        """A session that may serve several turns: what a new prompt shares with the last is not computed again.

        Nor is what the first one, `prompt_ids`, shares with prompts of earlier sessions, where peers still hold that.
        `on_event` hears of this session's events in the place of the client's own.
        """
        router = self._joined
        assert self._network is not None
        generator = await self.generator(model_name)
        spec = generator.spec
        request = RouteRequest(
            model=spec.name,
            digest=spec.digest,
            model_blocks=spec.blocks,
            prompt_tokens=max(kv_tokens - new_tokens, 1),
            new_tokens=new_tokens,
            kv_tokens=kv_tokens,
            row_bytes=row_bytes(spec.hidden_size, self._config.dtype, self._config.codec),
            dtype=self._config.dtype,
            quantization=self._config.quantization,
        )
        on_event = on_event or self._on_event
        prefix = generator.prefix_keys(prompt_ids) if self._config.share_prefixes else ()
        session = Session(
            self._network, router, request, self._config, on_event=on_event, trace=trace, prefix=prefix, sound=is_finite
        )
        with about(session=session.label):
            async with session:
                yield await generator.begin(session, prompt_ids)

    async def generator(self, model_name: str) -> Generator:
        """The ends of a model on this machine, loaded when first asked for."""
        if self._gateway is not None:
            raise UsageError("through a gateway, no part of a model is here", hint="give a multiaddr as the endpoint")
        async with self._loading:
            if model_name not in self._generators:
                self._generators[model_name] = await asyncio.to_thread(_load, model_name, self._config)
            return self._generators[model_name]

    async def _run(self, request: GenerationRequest, model_name: str) -> Generation:
        return await _last(self._stream(request, model_name))

    async def _ask(self, messages: prompts.Messages, model_name: str, **options: Unpack[Options]) -> str:
        if self._gateway is not None:
            if await self._gateway.has_chat_template(model_name):
                return (await self.chat(messages, model_name, **options)).text.strip()
            return (await self._run(_request(prompts.plain(messages), **options), model_name)).text.strip()
        generator = await self.generator(model_name)
        prompt = generator.chat_prompt(messages) if generator.has_chat_template else prompts.plain(messages)
        return (await self._run(_request(prompt, **options), model_name)).text.strip()

    @property
    def _joined(self) -> Router:
        if self._gateway is not None:
            raise UsageError("a gateway lets nobody into its sessions", hint="give a multiaddr as the endpoint")
        if self._router is None:
            raise UsageError("the client has not joined", hint="use it in a with block: with LLMasOS(…) as client:")
        return self._router


async def _last(pieces: AsyncIterator[str | Generation]) -> Generation:
    """What a stream ends with."""
    result: Generation | None = None
    async for piece in pieces:
        if isinstance(piece, Generation):
            result = piece
    assert result is not None, "a stream that did not raise ends with its Generation"
    return result


def _load(model_name: str, config: ClientConfig) -> Generator:
    spec = resolve(model_name)
    ends = load_ends(spec, dtype=config.dtype, quantization=config.quantization)
    tokenizer = load_tokenizer(spec)
    draft = DraftModel(config.draft_model, tokenizer) if config.draft_model else None
    return Generator(spec, ends, tokenizer, speculate=config.speculate, draft=draft)
