"""A gateway as seen by the Python client: the same requests and results as in the swarm itself, over HTTP."""

import json
import os
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from llmasos.client.generation import Generation, GenerationRequest, RoutedHop
from llmasos.client.trace import Trace, trace_from_json
from llmasos.errors import (
    LLMasOSError,
    MissingBlocksError,
    SwarmError,
    SwarmUnreachableError,
    UnknownModelError,
    UsageError,
)

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 180.0
"""A gateway sends a comment every 15 s while a text is written; before that it may have us wait for a place."""

KEY_HINT = "LLMasOS(endpoint, api_key=…)"

Messages = Sequence[Mapping[str, Any]]


class HttpGateway:
    """One gateway. `open` before use, `close` after it."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"HttpGateway({self._url!r})"  # without the key

    async def open(self) -> None:
        """See whether it answers. Raises SwarmUnreachableError."""
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        await self._json("GET", "/health")

    async def close(self) -> None:
        """Hang up. May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def models(self) -> list[str]:
        """The models whose blocks all have a peer."""
        return [model["id"] for model in (await self._json("GET", "/v1/models"))["data"]]

    async def status(self) -> dict[str, Any]:
        """What the swarm serves."""
        found: dict[str, Any] = await self._json("GET", "/api/swarm")
        return found

    async def has_chat_template(self, model: str) -> bool:
        """Whether the model says how a conversation is written."""
        return bool((await self._json("GET", "/tokenizer_info", params={"model": model}))["chat_template"])

    async def stream(
        self, request: GenerationRequest, model: str, messages: Messages | None = None
    ) -> AsyncGenerator[str | Generation, None]:
        """Pieces of text, and the whole Generation last, behind the request's prompt or behind `messages`."""
        if messages is not None and request.return_full_text:
            raise UsageError("return_full_text means nothing for a conversation over HTTP", hint="leave it out")
        source = {"prompt": request.prompt} if messages is None else {"messages": [dict(turn) for turn in messages]}
        counted = await self._json("POST", "/tokenize", json={"model": model, **source})
        new_tokens = request.new_tokens(counted["count"], counted["max_model_len"])
        sampling = request.sampling
        body = {
            "model": model,
            **source,
            "max_tokens": new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "stop": list(request.stop) or None,
            "stream": True,
        }
        path = "/v1/completions" if messages is None else "/v1/chat/completions"
        result: Generation | None = None
        async with self._answer(
            "POST", path, json=body, headers={"x-llmasos-trace": "1" if request.trace else "route"}
        ) as answer:
            async for line in answer.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise _error(chunk["error"], 502)
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                    if piece:
                        yield piece
                if "llmasos" in chunk:
                    times = chunk.get("llmasos_trace")
                    trace = trace_from_json(times[0]) if times else None
                    result = _generation(chunk["llmasos"]["texts"][0], request, trace)
        if result is None:
            raise SwarmError(f"{self._url} ended its answer in the middle")
        yield result

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        async with self._answer(method, path, **options) as answer:
            return await answer.json()

    @asynccontextmanager
    async def _answer(self, method: str, path: str, **options: Any) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        if self._session is None:
            raise UsageError("the client has not joined", hint="use it in a with block: with LLMasOS(…) as client:")
        try:
            async with self._session.request(method, self._url + path, **options) as answer:
                if answer.status >= 400:
                    raise _error(await _error_object(answer), answer.status)
                yield answer
        except (aiohttp.ClientError, TimeoutError) as error:
            raise SwarmUnreachableError(
                f"the gateway {self._url} does not answer: {_why(error)}",
                hint="is it running? llmasos gateway --join MULTIADDR",
            ) from error


def _why(error: Exception) -> str:
    """What the machine says of it; aiohttp's own words would repeat the address, and settings that nobody made."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, socket.gaierror | ssl.SSLError):
        return cause.strerror or str(cause)
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)
    return str(error) or type(error).__name__


async def _error_object(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    try:
        found = (await answer.json())["error"]
    except (aiohttp.ClientError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        return {"message": f"{answer.url} answered {answer.status} {answer.reason}; is it an LLMasOS gateway?"}
    return found


def _error(found: Mapping[str, Any], status: int) -> LLMasOSError:
    """An error object as the exception that the swarm itself would have raised."""
    message, code = str(found.get("message")), found.get("code")
    if code == "missing_blocks" and (said := re.match(r"blocks ([\d:, ]+) of (\S+) have no peer", message)):
        return MissingBlocksError(said[2], said[1].split(", "))
    if code == "model_not_found":
        return UnknownModelError(message)
    if status in (401, 403):
        return UsageError(message, hint=KEY_HINT)
    if status < 500 and status != 429:
        return UsageError(message)
    return SwarmError(message)


def _generation(told: Mapping[str, Any], request: GenerationRequest, trace: Trace | None) -> Generation:
    shown = dict(told)
    shown["text"] = (request.prompt if request.return_full_text else "") + told["text"]
    shown["route"] = tuple(RoutedHop(**hop) for hop in told["route"])
    shown["token_ids"] = tuple(told["token_ids"])
    return Generation(**shown, trace=trace)
