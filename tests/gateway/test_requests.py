"""Requests, read from JSON: what is honoured, what is refused by name. No swarm."""

import contextlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.client.openai_answers import CALL_BEGINS, CALL_ENDS, ToolCalls
from llmasos.client.openai_api import parse_chat, parse_completion, parse_tokenize
from llmasos.client.openai_fields import ApiError, Fields, as_api_error, parse_body
from llmasos.errors import MissingBlocksError, PeerRefusedError, PeerTimeoutError, UnknownModelError, UsageError

HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
GO_ON = {"model": "m", "prompt": "Hello"}


def chat(**fields: Any) -> Any:
    return parse_chat(Fields({**HELLO, **fields}))


def completion(**fields: Any) -> Any:
    return parse_completion(Fields({**GO_ON, **fields}))


def test_defaults_are_those_of_openai() -> None:
    options = chat().options
    assert (options.temperature, options.top_p, options.n, options.stream) == (1.0, 1.0, 1, False)
    assert (options.max_tokens, options.logprobs, options.json_schema, options.stop) == (None, None, None, ())


def test_nulls_and_unknown_fields_mean_nothing() -> None:
    sampling = [
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "logit_bias",
        "presence_penalty",
        "logprobs",
        "top_logprobs",
    ]
    others = [
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "max_tokens",
        "max_completion_tokens",
        "response_format",
    ]
    nulls = dict.fromkeys([*sampling, *others])
    assert chat(**nulls, user="me", metadata={"a": 1}, hobby="chess", best_of=None, store=False) == chat()


def test_the_best_one_of_one_is_no_choice() -> None:
    assert chat(best_of=1) == chat()
    assert chat(best_of=2, n=2) == chat(n=2)


def test_messages_as_text_and_as_parts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(messages=[{"role": "user", "content": parts}]) == chat()
    assert chat(messages=[{"role": "developer", "content": "Be kind"}]).messages[0]["role"] == "system"


def test_prompts_in_four_forms() -> None:
    assert completion(prompt="a").prompts == ("a",)
    assert completion(prompt=["a", "b"]).prompts == ("a", "b")
    assert completion(prompt=[5, 6]).prompts == ((5, 6),)
    assert completion(prompt=[[5], [6, 7]]).prompts == ((5,), (6, 7))


def test_both_names_of_the_length() -> None:
    assert chat(max_tokens=7).options.max_tokens == 7
    assert chat(max_completion_tokens=7).options.max_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).options.max_tokens == 7


def test_schemas_and_past_tool_calls() -> None:
    assert chat(response_format={"type": "text"}).options.json_schema is None
    assert chat(response_format={"type": "json_object"}).options.json_schema == '{"type": "object"}'
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    assert chat(response_format=wanted).options.json_schema == '{"type":"integer"}'
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turn = chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]).messages[0]
    assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "tool_calls": [7]}]}, "messages[0].tool_calls[0]"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0.001}, "repetition_penalty"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 99}, "n"),
        ({"n": 1.5}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"best_of": 3}, "best_of"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.param, caught.value.status) == (param, 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 4}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"tools": [{}]}, "tools"),
    ],
    ids=str,
)
def test_completions_too(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_nothing_to_generate_is_fine_with_an_echo() -> None:
    assert completion(max_tokens=0, echo=True).options.max_tokens == 0


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"5", b'{"a": NaN}', b'{"a": "\xff"}', b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a":1}x'],
    ids=lambda raw: repr(raw[:20]),
)
def test_a_body_that_is_no_json_object(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(raw)
    assert caught.value.code == "invalid_json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
FIELDS = ["model", "messages", "prompt", "temperature", "top_p", "n", "stop", "logit_bias", "response_format", "tools"]


@given(body=st.dictionaries(st.sampled_from([*FIELDS, "tool_choice", "stream_options", "max_tokens"]), JSON))
def test_whatever_arrives_is_read_or_refused(body: dict[str, Any]) -> None:
    for parse, base in ((parse_chat, HELLO), (parse_completion, GO_ON), (parse_tokenize, GO_ON)):
        with contextlib.suppress(ApiError):
            parse(Fields({**base, **body}))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UsageError("no"), 400, None),
        (UnknownModelError("no"), 404, "model_not_found"),
        (MissingBlocksError("m", ["3:5"]), 503, "missing_blocks"),
        (PeerRefusedError("p", "full", retry_after_s=7.0), 503, "busy"),
        (PeerTimeoutError("p", "silent"), 504, None),
    ],
)
def test_errors_of_ours_in_their_form(error: Any, status: int, code: str | None) -> None:
    made = as_api_error(error)
    assert (made.status, made.code) == (status, code)
    assert error.message in str(made)
    if isinstance(error, MissingBlocksError):
        assert "--blocks 3:5" in made.message
    if isinstance(error, PeerRefusedError):
        assert made.retry_after_s == 7.0


CALL = f'{CALL_BEGINS}\n{{"name": "f", "arguments": {{"x": "ä"}}}}\n{CALL_ENDS}'


@given(cuts=st.lists(st.integers(0, 200), max_size=9))
def test_tool_calls_are_found_however_the_text_is_cut(cuts: list[int]) -> None:
    text = f"One < two. {CALL} and {CALL_BEGINS}nonsense{CALL_ENDS}{CALL}<tool"
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    calls = ToolCalls("id")
    said = "".join(calls.add(text[start:end]) for start, end in pairwise(edges)) + calls.finish()
    assert said == f"One < two.  and {CALL_BEGINS}nonsense{CALL_ENDS}<tool"
    assert [(call.name, call.arguments, call.id) for call in calls.calls] == [
        ("f", '{"x": "ä"}', "id_0"),
        ("f", '{"x": "ä"}', "id_1"),
    ]


def test_a_call_that_is_not_ended_counts_if_it_is_whole() -> None:
    calls = ToolCalls("id")
    assert calls.add(f'{CALL_BEGINS}{{"name": "f", "arguments": {{}}}}') == ""
    assert calls.finish() == ""
    assert [call.name for call in calls.calls] == ["f"]
