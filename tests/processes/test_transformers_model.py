"""The swarm as a `transformers` model: what its generation offers gives what it gives on one machine."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from llmasos import SwarmModelForCausalLM, UsageError
from llmasos.blocks.registry import resolve
from llmasos.local import LocalSwarm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(swarm: LocalSwarm) -> AsyncIterator[tuple[Any, Any]]:
    """The model in the swarm, and the same on this machine."""
    await asyncio.gather(swarm.start_peer("a", "0:17"), swarm.start_peer("b", "17:30"))
    path = resolve("smollm2").source.file.path
    local = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    remote = await asyncio.to_thread(SwarmModelForCausalLM.from_pretrained, "smollm2", endpoint=swarm.address)
    yield remote, local
    await asyncio.to_thread(remote.close)


def batch(model: Any) -> dict[str, torch.Tensor]:
    """Two texts of different lengths."""
    model.tokenizer.padding_side = "left"
    model.tokenizer.pad_token_id = 2
    return dict(model.tokenizer(["The world is", "Once upon a time there was a"], return_tensors="pt", padding=True))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "max_new_tokens": 12},
        {"do_sample": False, "num_beams": 3, "max_new_tokens": 10},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2, "max_new_tokens": 8},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "max_new_tokens": 10},
    ],
    ids=["greedy", "beams", "sampling", "processors"],
)
async def test_generate(options: dict[str, Any], models: tuple[Any, Any]) -> None:
    remote, local = models

    def run(model: Any) -> torch.Tensor:
        torch.manual_seed(1)
        return model.generate(**batch(remote), pad_token_id=2, **options)

    assert torch.equal(await asyncio.to_thread(run, remote), run(local))


async def test_forward_scores_every_position(models: tuple[Any, Any]) -> None:
    remote, local = models
    ids = batch(remote)["input_ids"][1:]
    found = await asyncio.to_thread(remote, ids)
    with torch.no_grad():
        expected = local(ids)
    assert found.logits.shape == expected.logits.shape
    assert torch.allclose(found.logits, expected.logits, atol=1e-3)
    with pytest.raises(UsageError, match="output_attentions"):
        await asyncio.to_thread(remote, ids, output_attentions=True)
    with pytest.raises(UsageError, match="left"):
        await asyncio.to_thread(remote, ids, torch.tensor([[1] * (ids.shape[1] - 1) + [0]]))
