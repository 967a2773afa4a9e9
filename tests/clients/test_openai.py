"""The official `openai` package, sync and async, against a gateway over a swarm of processes."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from llmasos.client.async_client import AsyncLLMasOS
from tests.clients.conftest import Guarded, Running

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TALE: list[Any] = [{"role": "user", "content": "Tell me a long story about a fox."}]
ASK: dict[str, Any] = {"model": "smollm2", "messages": QUESTION, "temperature": 0}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_a_chat_by_the_models_own_template(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**ASK)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert [model.id for model in (await client.models.list()).data] == ["smollm2"]
    assert (await client.models.retrieve("smollm2")).id == "smollm2"


async def test_a_stream_is_the_same_text(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**ASK)
    stream = await client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert len(parts) > 4
    assert chunks[-1].usage == whole.usage


def ask_synchronously(url: str) -> tuple[str, str]:
    wanted: dict[str, Any] = {"model": "smollm2", "prompt": "The world is", "max_tokens": 8, "temperature": 0}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.completions.create(**wanted)
        pieces = client.completions.create(**wanted, stream=True)
        return answer.choices[0].text, "".join(piece.choices[0].text for piece in pieces)


async def test_the_sync_client(running: Running) -> None:
    whole, streamed = await asyncio.to_thread(ask_synchronously, running.url)
    assert len(whole) > 5
    assert streamed == whole


async def test_several_choices_and_their_scores(client: openai.AsyncOpenAI) -> None:
    wanted = {**ASK, "temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 12, "logprobs": True, "top_logprobs": 4}
    first = await client.chat.completions.create(**wanted)
    again = await client.chat.completions.create(**wanted)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    for choice in first.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert bytes(byte for token in choice.logprobs.content for byte in token.bytes or []).decode() == (
            choice.message.content
        )
        assert all(len(token.top_logprobs) == 4 for token in choice.logprobs.content)


async def test_a_schema(client: openai.AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "capital": {"type": "boolean"}},
        "required": ["city", "capital"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = await client.chat.completions.create(**ASK, response_format=form, max_tokens=80)
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"city", "capital"}


async def test_errors_are_the_packages_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(**{**ASK, "model": "gpt-4o"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(**{**ASK, "temperature": -1})
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context"):
        await client.completions.create(model="smollm2", prompt="word " * 9_000)


async def test_closing_a_stream_ends_the_generation(client: openai.AsyncOpenAI, running: Running) -> None:
    stream = await client.chat.completions.create(model="smollm2", messages=TALE, max_tokens=2_000, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert len((await running.activity())["running"]) == 1
    await stream.close()
    await until_nothing_runs(running)
    await until_kv_is_free(running)


async def test_cancelling_a_request_ends_the_generation(client: openai.AsyncOpenAI, running: Running) -> None:
    wanted: dict[str, Any] = {"model": "smollm2", "messages": TALE, "max_tokens": 2_000}
    request = asyncio.create_task(client.chat.completions.create(**wanted))
    async with asyncio.timeout(30):
        while not (await running.activity())["running"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await until_nothing_runs(running)


async def until_nothing_runs(running: Running) -> None:
    async with asyncio.timeout(10):
        while (await running.activity())["running"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def until_kv_is_free(running: Running) -> None:
    """On every peer, by its own announcement."""
    async with asyncio.timeout(20), AsyncLLMasOS(running.url) as watcher:
        while any(peer["load"] for model in (await watcher.status())["models"] for peer in model["peers"]):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


def ask_until_let_in(guarded: Guarded) -> str:
    """Two requests of a key that may have one; the package comes back when it is told to."""
    wanted: dict[str, Any] = {"model": "smollm2", "prompt": "The world is", "temperature": 0, "max_tokens": 8}
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.secret, max_retries=8) as patient:
        first = patient.completions.create(**{**wanted, "max_tokens": 60}, stream=True)
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as refused:
            patient.with_options(max_retries=0).completions.create(**wanted)
        assert refused.value.response.headers["retry-after"] == "1"
        return patient.completions.create(**wanted).choices[0].text


async def test_the_package_retries_when_it_is_told_to(guarded: Guarded) -> None:
    assert len(await asyncio.to_thread(ask_until_let_in, guarded)) > 5


async def test_a_wrong_key(guarded: Guarded) -> None:
    async with openai.AsyncOpenAI(base_url=f"{guarded.url}/v1", api_key="sk-llmasos-wrong") as stranger:
        with pytest.raises(openai.AuthenticationError, match="not known") as refused:
            await stranger.models.list()
    assert "sk-llmasos-wrong" not in str(refused.value)


async def test_many_at_once(client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(*(client.chat.completions.create(**ASK) for _ in range(8)))
    assert len({answer.choices[0].message.content for answer in answers}) == 1


async def test_a_peer_killed_in_mid_stream_changes_nothing(client: openai.AsyncOpenAI, running: Running) -> None:
    wanted: dict[str, Any] = {"model": "smollm2", "messages": TALE, "temperature": 0, "max_tokens": 60}
    traced = {"x-llmasos-trace": "1"}
    await running.heal()
    whole = await client.chat.completions.create(**wanted, extra_headers=traced)
    stream = await client.chat.completions.create(**wanted, stream=True, extra_headers=traced)
    text, failovers, killed = "", 0, None
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        if text and killed is None:
            killed = await running.kill_one_in_use()
        for trace in (chunk.model_extra or {}).get("llmasos", {}).get("texts", []):
            failovers = trace["failovers"]
    assert text == whole.choices[0].message.content
    assert failovers == 1
