"""The swarm writes what one machine would: token for token, whatever the split."""

from functools import cache
from typing import Any

import pytest
import torch

from llmasos.blocks.registry import ModelSpec
from llmasos.blocks.sampling import SamplingParams
from llmasos.client.generation import Generation, GenerationRequest
from llmasos.config import ClientConfig
from llmasos.errors import MissingBlocksError, UsageError
from tests.swarm.conftest import torch_swarm

SPLITS = {
    1: ["0:30"],
    2: ["0:11", "11:30"],
    3: ["0:4", "4:19", "19:30"],
    5: ["0:1", "1:8", "8:14", "14:27", "27:30"],
}
TEXT = (
    "The city had grown along the river for two thousand years, and every century had left something behind: a wall, "
    "a market, a bridge that nobody dared to tear down. "
) * 20


def greedy(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    """What transformers writes behind `ids`."""
    return list(_greedy(model, tuple(ids), new_tokens))


@cache
def _greedy(model: Any, ids: tuple[int, ...], new_tokens: int) -> tuple[int, ...]:
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    return tuple(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("peers", SPLITS)
async def test_greedy_tokens_are_those_of_transformers(peers: int, smollm2: ModelSpec, smollm2_reference: Any) -> None:
    async with torch_swarm(smollm2, SPLITS[peers]) as (client, _):
        tokenizer = (await client.generator("smollm2")).tokenizer
        ids = tokenizer(TEXT)["input_ids"]
        for prompt_tokens, new_tokens in ((1, 128), (2, 16), (37, 16), (600, 128)):
            prompt = tokenizer.decode(ids[:prompt_tokens])
            assert tokenizer(prompt)["input_ids"] == ids[:prompt_tokens]
            result = await client.generate(prompt, max_new_tokens=new_tokens)
            expected = greedy(smollm2_reference, ids[:prompt_tokens], new_tokens)
            assert list(result.token_ids) == expected
            assert [hop.blocks for hop in result.route] == SPLITS[peers]
            assert result.prompt_tokens == prompt_tokens


async def test_routes_enter_a_span_in_its_middle(smollm2: ModelSpec, smollm2_reference: Any) -> None:
    async with torch_swarm(smollm2, ["0:19", "4:30"]) as (client, _):
        result = await client.generate("The world is", max_new_tokens=64)
        ids = (await client.generator("smollm2")).tokenizer("The world is")["input_ids"]
        assert len(result.route) == 2
        assert result.route[0].blocks.startswith("0:")
        assert list(result.token_ids) == greedy(smollm2_reference, ids, 64)


async def test_several_turns_on_one_session(smollm2: ModelSpec, smollm2_reference: Any) -> None:
    """Each turn extends the last; a turn that differs in the middle rolls back to where it does."""
    async with torch_swarm(smollm2, SPLITS[3]) as (client, peers):
        generator = await client.generator("smollm2")
        prompts = [TEXT[:300], TEXT[:300] + " And then", TEXT[:500], TEXT[:120] + "Still, it was quiet."]
        async with client.dialogue("smollm2", 1_000) as dialogue:
            for prompt in prompts:
                ids = await generator.encode(prompt)
                request = GenerationRequest(prompt, max_new_tokens=12)
                pieces = [piece async for piece in generator.run(request, dialogue, ids, 12)]
                result = pieces[-1]
                assert isinstance(result, Generation)
                assert list(result.token_ids) == greedy(smollm2_reference, ids, 12)
                assert "".join(piece for piece in pieces if isinstance(piece, str)) == result.text
            assert peers[0].engine.scheduler.active_sessions == 1


async def test_a_seed_gives_the_same_text_whatever_the_split(smollm2: ModelSpec) -> None:
    options = {"max_new_tokens": 30, "temperature": 1.2, "top_p": 0.95, "top_k": 60, "seed": 5}
    texts = set()
    for split in (SPLITS[1], SPLITS[5]):
        async with torch_swarm(smollm2, split) as (client, _):
            texts.add(await client.generate_text("Once upon a time", **options))
            assert await client.generate_text("Once upon a time", **{**options, "seed": 6}) not in texts
    assert len(texts) == 1


async def test_sessions_that_share_passes_do_not_touch_each_other(smollm2: ModelSpec, smollm2_reference: Any) -> None:
    async with torch_swarm(smollm2, SPLITS[2]) as (client, peers):
        tokenizer = (await client.generator("smollm2")).tokenizer
        prompts = [TEXT[: 40 + 90 * index] for index in range(6)]
        results = await client.generate_batch(prompts, max_new_tokens=24)
        for prompt, result in zip(prompts, results, strict=True):
            assert list(result.token_ids) == greedy(smollm2_reference, tokenizer(prompt)["input_ids"], 24)
        steps = sum(-(-result.prompt_tokens // 128) + 23 for result in results)
        assert peers[1].engine.passes < steps / 2


async def test_what_is_asked_for_is_what_comes(smollm2: ModelSpec) -> None:
    async with torch_swarm(smollm2, ["0:30"]) as (client, peers):
        full = await client.generate_text("The world is", max_length=20)
        assert full.startswith("The world is")
        completion = await client.generate_text("The world is", max_new_tokens=17, return_full_text=False)
        assert full == "The world is" + completion
        pieces = [piece async for piece in client.stream_text("The world is", max_new_tokens=17)]
        assert "".join(pieces) == completion
        assert len(pieces) > 5
        word = completion.split()[3]
        stopped = await client.generate("The world is", max_new_tokens=17, stop=word)
        assert stopped.text == completion[: completion.index(word)]
        assert stopped.finish_reason == "stop"
        turn = await client.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=30)
        assert "Paris" in turn.text
        assert "Paris" in await client.answer("What is the capital of France?", max_new_tokens=30)
        assert await client.models() == ["smollm2"]
        (model,) = (await client.status())["models"]
        assert (model["covered"], model["missing"], len(model["peers"])) == (True, [], 1)
        await peers[0].handler.wait_until_idle()
        assert peers[0].engine.scheduler.kv_free_tokens == 20_000


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "empty"),
        ("\ud800", {}, "not valid text"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens"),
        ("x", {"max_new_tokens": -3}, "max_new_tokens"),
        ("x", {"max_length": -1}, "max_length"),
        ("The world is", {"max_length": 3}, "max_length"),
        ("x", {"max_length": 5, "max_new_tokens": 5}, "both"),
        ("x", {"temperature": -0.5}, "temperature"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"top_k": -1}, "top_k"),
        ("x", {"repetition_penalty": 0.0}, "repetition_penalty"),
        ("x", {"stop": ["a", ""]}, "stop"),
        ("word " * 9_000, {}, "context"),
        (b"bytes", {}, "not a text"),
    ],
)
async def test_a_wrong_request_is_refused_by_name(
    prompt: Any, options: dict[str, Any], words: str, smollm2: ModelSpec
) -> None:
    async with torch_swarm(smollm2, ["0:30"]) as (client, _):
        with pytest.raises(UsageError, match=words):
            await client.generate(prompt, **options)


async def test_missing_blocks_are_named_with_the_command_that_serves_them(smollm2: ModelSpec) -> None:
    async with torch_swarm(smollm2, ["0:11", "19:30"]) as (client, _):
        with pytest.raises(MissingBlocksError) as caught:
            await client.generate("The world is")
        assert caught.value.missing == ["11:19"]
        assert "--blocks 11:19 --model smollm2" in caught.value.hint


def test_sampling_parameters_are_checked_before_anything_is_sent() -> None:
    with pytest.raises(UsageError):
        SamplingParams(top_p=1.5)


@pytest.mark.parametrize("temperature", [0.0, 0.4])
async def test_speculation_changes_nothing_but_the_number_of_steps(temperature: float, smollm2: ModelSpec) -> None:
    prompt = "1 2 3 4 5 6 7 8 9 10\n" * 3 + "1 2 3"
    options = {"max_new_tokens": 30, "temperature": temperature, "seed": 3}
    found = {}
    for speculate in (False, True):
        async with torch_swarm(smollm2, SPLITS[2], config=ClientConfig(speculate=speculate)) as (client, peers):
            result = await client.generate(prompt, **options)
            found[speculate] = (result.token_ids, peers[0].engine.passes)
    assert found[True][0] == found[False][0]
    assert found[False][1] >= result.completion_tokens
    assert found[True][1] < found[False][1] / 2
