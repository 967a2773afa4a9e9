"""Answers of the gateway over HTTP, in front of real blocks: what OpenAI's clients rely on."""

import json

import pytest
import torch

from llmasos.blocks.registry import ModelSpec
from llmasos.client.token_bytes import TokenBytes
from llmasos.config import ClientConfig
from tests.gateway.conftest import CHAT, COMPLETIONS, GO_ON, HELLO, Served, error_of, folder_of, serve


async def test_models(tiny_gateway: Served) -> None:
    listed = await (await tiny_gateway.http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert (await (await tiny_gateway.http.get("/v1/models/tiny")).json()) == listed["data"][0]
    missing = await tiny_gateway.http.get("/v1/models/huge")
    assert (missing.status, error_of(await missing.json())["code"]) == (404, "model_not_found")


async def test_a_model_with_a_gap_is_not_offered(tiny: ModelSpec) -> None:
    async with serve(tiny, ["0:2", "3:5"], source=folder_of(tiny)) as served:
        assert (await (await served.http.get("/v1/models")).json())["data"] == []
        answer = await served.http.post(CHAT, json=HELLO)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        error = error_of(await answer.json())
        assert error["code"] == "missing_blocks"
        assert "--blocks 2:3" in error["message"]


async def test_a_model_in_other_numbers_is_not_offered(tiny: ModelSpec) -> None:
    """A gateway for int8 over peers of float32: it has no model, and says how it would get one."""
    async with serve(tiny, source=folder_of(tiny), client_config=ClientConfig(quantization="int8")) as served:
        assert (await (await served.http.get("/v1/models")).json())["data"] == []
        answer = await served.http.post(COMPLETIONS, json=GO_ON)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        error = error_of(await answer.json())
        assert error["code"] == "missing_blocks"
        assert "0:5" in error["message"]
        assert "not in float32 int8" in error["message"]
        assert "--quantize int8" in error["message"]


async def test_a_stream_says_what_the_answer_in_one_piece_says(tiny_gateway: Served) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETIONS, GO_ON)):
        wanted = {**body, "n": 2}
        status, whole = await tiny_gateway.post(path, wanted)
        assert status == 200
        stream = await tiny_gateway.stream(path, wanted)
        assert stream.done
        for index, choice in enumerate(whole["choices"]):
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            assert stream.text(index) == text
        assert whole["choices"][0] != {**whole["choices"][1], "index": 0}
        heads = {(chunk["id"], chunk["created"], chunk["model"]) for chunk in stream.chunks}
        assert len(heads) == 1
        assert all("usage" not in chunk for chunk in stream.chunks)
    assert await tiny_gateway.kv_is_free()


async def test_the_form_of_a_chat_stream(tiny_gateway: Served) -> None:
    stream = await tiny_gateway.stream(CHAT, {**HELLO, "stream_options": {"include_usage": True}})
    *chunks, last = stream.chunks
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] in ("stop", "length")
    assert set(reasons[:-1]) == {None}
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 12


async def test_prompts_in_all_forms(tiny_gateway: Served) -> None:
    greedy = {**GO_ON, "temperature": 0}
    _, tokens = await tiny_gateway.post("/tokenize", {"model": "tiny", "prompt": "ab"})
    ids = tokens["tokens"]
    assert (tokens["count"], tokens["max_model_len"]) == (2, 256)
    texts = [
        [
            choice["text"]
            for choice in (await tiny_gateway.post(COMPLETIONS, {**greedy, "prompt": prompt}))[1]["choices"]
        ]
        for prompt in ("ab", ids, ["ab", "ba"], [ids, ids])
    ]
    assert texts[0] == texts[1] == texts[2][:1] == texts[3][:1] == texts[3][1:]
    _, detokenized = await tiny_gateway.post("/detokenize", {"model": "tiny", "tokens": ids})
    assert detokenized == {"prompt": "ab"}


async def test_scores_are_those_of_the_model(tiny: ModelSpec, tiny_gateway: Served) -> None:
    """Echo with logprobs is what evaluation harnesses read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder_of(tiny)).eval()
    ids = [40, 41, 77, 90, 12, 200]
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    body = {**GO_ON, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 3, "echo": True}
    _, answer = await tiny_gateway.post(COMPLETIONS, body)
    scores = answer["choices"][0]["logprobs"]
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    for position, token in enumerate(ids[1:]):
        assert scores["token_logprobs"][position + 1] == pytest.approx(float(wanted[position, token]), abs=1e-4)
        best = max(value for value in scores["top_logprobs"][position + 1].values())
        assert best == pytest.approx(float(wanted[position].max()), abs=1e-4)
    assert scores["token_logprobs"][-1] == pytest.approx(float(wanted[-1].max()), abs=1e-4)
    _, alone = await tiny_gateway.post(COMPLETIONS, {**body, "max_tokens": 0})
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(scores["token_logprobs"][:-1])
    assert alone["usage"]["completion_tokens"] == 0


async def test_chat_scores_have_bytes_that_make_up_the_text(tiny_gateway: Served) -> None:
    _, answer = await tiny_gateway.post(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2})
    choice = answer["choices"][0]
    scored = choice["logprobs"]["content"]
    raw = b"".join(bytes(token["bytes"]) for token in scored if token["token"] not in ("<s>", "<pad>"))
    assert raw.decode(errors="replace") == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in scored)
    stream = await tiny_gateway.stream(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2})
    parts = [chunk["choices"][0]["logprobs"] for chunk in stream.chunks]
    assert [token for part in parts if part for token in part["content"]] == scored


async def test_a_schema_is_obeyed(tiny_gateway: Served) -> None:
    """By a model that writes noise."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        body = {**HELLO, "seed": seed, "max_tokens": 100, "temperature": 0.5, "response_format": wanted}
        _, answer = await tiny_gateway.post(CHAT, body)
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"])["a"] in (1, 2)
        else:
            assert choice["message"]["content"].lstrip().startswith("{")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}
    status, refused = await tiny_gateway.post(CHAT, {**HELLO, "response_format": bad})
    assert status == 400
    assert "banana" in error_of(refused)["message"]


async def test_biases_and_stops(tiny_gateway: Served) -> None:
    biased = {**GO_ON, "temperature": 0, "logit_bias": {"50": 100}}
    _, answer = await tiny_gateway.post(COMPLETIONS, biased)
    letter = answer["choices"][0]["text"][0]
    assert answer["choices"][0]["text"] == 9 * letter
    _, stopped = await tiny_gateway.post(COMPLETIONS, {**biased, "stop": [3 * letter, "never"]})
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == ("", "stop")
    assert stopped["usage"]["completion_tokens"] == 3
    stream = await tiny_gateway.stream(COMPLETIONS, {**biased, "stop": [f"{letter}x"]})
    assert stream.text() == 9 * letter


def test_bytes_of_tokens() -> None:
    class Sentencepiece:
        backend_tokenizer = None

        def get_added_vocab(self) -> dict[str, int]:
            return {"</s>": 2}

        def convert_ids_to_tokens(self, token: int) -> str | None:
            return {2: "</s>", 3: "▁the", 4: "<0x0A>"}.get(token)

    raw = TokenBytes(Sentencepiece())
    assert [raw(token) for token in (2, 3, 4, 99)] == [b"</s>", b" the", b"\n", b""]
