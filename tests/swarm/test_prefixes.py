"""Prompts that begin alike are computed once, and the text is the same."""

from typing import Any

import pytest

from llmasos.blocks.registry import ModelSpec
from llmasos.client.generation import GenerationRequest
from llmasos.config import ClientConfig
from tests.swarm.conftest import torch_swarm
from tests.swarm.test_generation import TEXT, greedy

SPLIT = ["0:11", "11:30"]


def prompts(tokenizer: Any) -> list[str]:
    ids = tokenizer(TEXT)["input_ids"]
    system = tokenizer.decode(ids[:210])
    return [system + question for question in (" Who built the wall?", " When did the market close, and why?")]


@pytest.mark.parametrize("share", [True, False])
async def test_a_second_prompt_skips_what_the_first_has_had_computed(
    share: bool, smollm2: ModelSpec, smollm2_reference: Any
) -> None:
    config = ClientConfig(share_prefixes=share, speculate=False)
    async with torch_swarm(smollm2, SPLIT, config=config) as (client, peers):
        tokenizer = (await client.generator("smollm2")).tokenizer
        rows = []
        for prompt in prompts(tokenizer):
            before = [peer.engine.rows for peer in peers]
            result = await client.generate(prompt, max_new_tokens=12)
            rows.append([peer.engine.rows - count for peer, count in zip(peers, before, strict=True)])
            assert list(result.token_ids) == greedy(smollm2_reference, tokenizer(prompt)["input_ids"], 12)
            assert result.prompt_tokens == len(tokenizer(prompt)["input_ids"])
        computed = [len(tokenizer(prompt)["input_ids"]) + 11 for prompt in prompts(tokenizer)]
        assert rows[0] == [computed[0]] * 2
        assert rows[1] == [computed[1] - (192 if share else 0)] * 2
        for peer in peers:
            peer.engine.scheduler.check()
            assert peer.engine.prefixes.tokens == (192 if share else 0)


async def test_a_peer_that_is_lost_then_is_replaced(smollm2: ModelSpec, smollm2_reference: Any) -> None:
    """The hop before it must be able to replay rows that it never computed in this session."""
    async with torch_swarm(smollm2, ["0:11", "11:30", "11:30"]) as (client, peers):
        generator = await client.generator("smollm2")
        first, second = prompts(generator.tokenizer)
        for _ in range(40):  # until each of the two has had the prompt
            await client.generate(first, max_new_tokens=1)
            if all(peer.engine.prefixes.tokens for peer in peers):
                break
        ids = await generator.encode(second)
        lost = False
        async with client.dialogue("smollm2", len(ids) + 20, new_tokens=20, prompt_ids=ids) as dialogue:
            assert len(dialogue.held) == 192
            request = GenerationRequest(second, max_new_tokens=20)
            async for event in generator.run(request, dialogue, ids, 20):
                if not lost:
                    lost = True
                    hop = dialogue.session.route.hops[1].peer
                    (victim,) = [peer for peer in peers if peer.network.peer_id == hop]
                    await victim.handler.cut_off()
                last = event
        assert dialogue.session.failovers == 1
        assert not isinstance(last, str)
        assert list(last.token_ids) == greedy(smollm2_reference, ids, 20)
