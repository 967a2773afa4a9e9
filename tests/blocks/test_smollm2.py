"""The embedded model: its tokens are those of transformers."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llmasos.blocks.ends import ModelEnds, load_ends
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, load_blocks
from llmasos.blocks.quiet import quiet
from llmasos.blocks.registry import ModelSpec, load_tokenizer, resolve
from llmasos.blocks.source import GgufSource
from llmasos.span import Span

ASKED = 64


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return resolve("smollm2")


@pytest.fixture(scope="module")
def ends(spec: ModelSpec) -> ModelEnds:
    return load_ends(spec)


@pytest.fixture(scope="module")
def pieces(spec: ModelSpec) -> list[DecoderBlocks]:
    return [load_blocks(spec, span) for span in (Span(0, 11), Span(11, 12), Span(12, 30))]


@pytest.fixture(scope="module")
def prompt(spec: ModelSpec) -> list[int]:
    chat = [{"role": "user", "content": "Name three facts about the sea."}]
    text = load_tokenizer(spec).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return load_tokenizer(spec)(text)["input_ids"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def wanted(spec: ModelSpec, prompt: list[int]) -> list[int]:
    """By transformers alone: its own reader of GGUF files, its own model, its own generate."""
    assert isinstance(spec.source, GgufSource)
    with quiet():
        model: Any = AutoModelForCausalLM.from_config(spec.config, dtype=torch.float32).eval()
        path = str(spec.source.file.path)
        model.load_state_dict(
            load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"], strict=False
        )
    model.tie_weights()
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=ASKED, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def test_64_tokens_equal_those_of_transformers(
    ends: ModelEnds, pieces: list[DecoderBlocks], prompt: list[int], wanted: list[int]
) -> None:
    """Three pieces, the prompt in two chunks, and a second session that decodes in the same passes."""
    mine, other = ([piece.new_cache() for piece in pieces] for _ in range(2))

    def step(ids: list[int], beside: list[int]) -> torch.Tensor:
        rows = [ends.embed(ids, mine[0].length), ends.embed(beside, other[0].length)]
        for index, piece in enumerate(pieces):
            caches = (mine[index], other[index])
            rows = piece.forward([BlockChunk(c, piece.span, c.length, r) for c, r in zip(caches, rows, strict=True)])
        return ends.logits(rows[0][-1:])[0]

    step(prompt[:20], prompt[:7])
    logits, given = step(prompt[20:], prompt[7:8]), []
    for index in range(ASKED):
        given.append(int(logits.argmax()))
        logits = step(given[-1:], prompt[index % 9 :][: index % 3])
    assert given == wanted
