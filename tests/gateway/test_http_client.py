"""LLMasOS(endpoint="http://…"): the same methods and the same results as in the swarm itself."""

from collections.abc import AsyncIterator

import pytest

from llmasos.blocks.registry import ModelSpec
from llmasos.client.async_client import AsyncLLMasOS
from llmasos.config import ClientConfig
from llmasos.errors import MissingBlocksError, SwarmUnreachableError, UnknownModelError, UsageError
from tests.gateway.conftest import Served, folder_of, serve


@pytest.fixture
async def remote(tiny_gateway: Served) -> AsyncIterator[AsyncLLMasOS]:
    async with AsyncLLMasOS(str(tiny_gateway.http.make_url("/"))) as client:
        yield client


OPTIONS = {"max_new_tokens": 17, "temperature": 0.8, "top_k": 50, "seed": 5}


async def test_the_same_results(tiny: ModelSpec, tiny_gateway: Served, remote: AsyncLLMasOS) -> None:
    here = tiny_gateway.client
    source = folder_of(tiny)
    direct = await here.generate("abc", source, **OPTIONS)
    assert (await remote.generate("abc", "tiny", **OPTIONS)).token_ids == direct.token_ids
    assert await remote.generate_text("abc", "tiny", max_length=20) == await here.generate_text(
        "abc", source, max_length=20
    )
    pieces = [piece async for piece in remote.stream_text("abc", "tiny", **OPTIONS)]
    assert "".join(pieces) == direct.text
    assert len(pieces) > 3
    batch = await remote.generate_batch(["abc", "x"], "tiny", **OPTIONS)
    assert batch[0].text == direct.text
    assert [hop.blocks for hop in batch[0].route] == ["0:2", "2:5"]
    messages = [{"role": "user", "content": "hello"}]
    assert (await remote.chat(messages, "tiny", **OPTIONS)).text == (await here.chat(messages, source, **OPTIONS)).text
    assert await remote.answer("why?", None, "tiny", **OPTIONS) == await here.answer("why?", None, source, **OPTIONS)
    assert await remote.models() == ["tiny"]
    assert [model["model"] for model in (await remote.status())["models"]] == ["tiny"]


async def test_the_same_trace(tiny_gateway: Served, remote: AsyncLLMasOS) -> None:
    plain = await remote.generate("abc", "tiny", **OPTIONS)
    assert plain.trace is None
    traced = await remote.generate("abc", "tiny", trace=True, **OPTIONS)
    assert traced.token_ids == plain.token_ids
    assert traced.trace is not None
    assert [hop.blocks for hop in traced.trace.hops] == ["0:2", "2:5"]
    assert traced.trace.total_ms == pytest.approx(sum(step.total_ms for step in traced.trace.steps))


async def test_the_same_errors(tiny: ModelSpec, remote: AsyncLLMasOS) -> None:
    with pytest.raises(UnknownModelError):
        await remote.generate("abc", "huge")
    with pytest.raises(UsageError, match="max_length"):
        await remote.generate("abc", "tiny", max_length=2)
    with pytest.raises(UsageError, match="context"):
        await remote.generate("abc" * 100, "tiny")
    with pytest.raises(UsageError, match="empty"):
        await remote.generate("", "tiny")
    with pytest.raises(UsageError, match="multiaddr"):
        await remote.generator("tiny")
    async with serve(tiny, ["0:2"], source=folder_of(tiny)) as served:
        async with AsyncLLMasOS(str(served.http.make_url("/v1"))) as client:
            with pytest.raises(MissingBlocksError) as caught:
                await client.generate("abc", "tiny")
        assert caught.value.missing == ["2:5"]
        assert "--blocks 2:5" in caught.value.hint


async def test_a_gateway_that_is_not_there() -> None:
    with pytest.raises(SwarmUnreachableError, match="does not answer"):
        async with AsyncLLMasOS("http://127.0.0.1:9"):
            pass


@pytest.mark.parametrize("endpoint", [["http://a", "/ip4/127.0.0.1/tcp/1/p2p/x"], ["http://a", "http://b"]])
def test_one_gateway_alone(endpoint: list[str]) -> None:
    with pytest.raises(UsageError, match="alone"):
        AsyncLLMasOS(endpoint)


def test_a_key_is_for_gateways_and_never_shown() -> None:
    with pytest.raises(UsageError, match="api_key"):
        AsyncLLMasOS("/ip4/127.0.0.1/tcp/1/p2p/x", api_key="secret")
    assert "secret" not in repr(vars(AsyncLLMasOS("http://a", api_key="secret")))


def test_a_config_is_for_swarms() -> None:
    """What a gateway would not hear of is refused, not dropped."""
    with pytest.raises(UsageError, match="config"):
        AsyncLLMasOS("http://a", config=ClientConfig(dtype="bfloat16"))
    AsyncLLMasOS("http://a", config=ClientConfig())
