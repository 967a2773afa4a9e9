"""`langchain-openai` against the gateway: invoke, stream, batch, structured output."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.clients.conftest import Running

langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: make clients")

QUESTION = "What is the capital of France?"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def model(running: Running) -> AsyncIterator[Any]:
    made = langchain.ChatOpenAI(
        base_url=f"{running.url}/v1", api_key="none", model="smollm2", temperature=0, max_tokens=24, stream_usage=True
    )
    yield made
    await made.root_async_client.close()


async def test_invoke(model: Any) -> None:
    answer = await model.ainvoke([("system", "You are terse."), ("human", QUESTION)])
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["model_name"] == "smollm2"


async def test_a_stream_is_the_same_text(model: Any) -> None:
    pieces = [piece async for piece in model.astream(QUESTION)]
    whole = await model.ainvoke(QUESTION)
    assert len(pieces) > 4
    assert "".join(piece.content for piece in pieces) == whole.content
    assert [piece.usage_metadata for piece in pieces if piece.usage_metadata] == [whole.usage_metadata]


async def test_a_batch(model: Any) -> None:
    questions = [QUESTION, "Count to three."]
    answers = await model.abatch(questions)
    assert [answer.content for answer in answers] == [(await model.ainvoke(one)).content for one in questions]
    assert answers[0].content != answers[1].content


async def test_plain_completions(running: Running) -> None:
    model = langchain.OpenAI(
        base_url=f"{running.url}/v1", api_key="none", model="smollm2", temperature=0, max_tokens=6, n=1
    )
    text = await model.ainvoke("The capital of France is")
    assert "Paris" in text
    assert "".join([piece async for piece in model.astream("The capital of France is")]) == text
    await model.async_client._client.close()
