"""Every field that OpenAI's own package can send: honoured, refused by name, or a mere label. None is dropped."""

import typing
from typing import Any

import pytest

from llmasos.client.openai_api import ChatRequest, CompletionRequest, parse_chat, parse_completion
from llmasos.client.openai_fields import ApiError, Fields
from llmasos.client.openai_unsupported import LABELS, UNSUPPORTED

chats = pytest.importorskip("openai.types.chat.completion_create_params")
completions = pytest.importorskip("openai.types.completion_create_params")
messages = pytest.importorskip("openai.types.chat")

TOOL = {"type": "function", "function": {"name": "f"}}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}

SAMPLES: dict[str, Any] = {
    "audio": {"voice": "ash", "format": "wav"},
    "best_of": 3,
    "echo": True,
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 3},
    "logprobs": True,
    "max_completion_tokens": 7,
    "max_tokens": 7,
    "messages": [{"role": "user", "content": "Bye"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "model": "another",
    "moderation": {"model": "m"},
    "n": 2,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": 0.5,
    "prompt": "Bye",
    "prompt_cache_key": "me",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "safety_identifier": "me",
    "seed": 4,
    "service_tier": "flex",
    "stop": ["x"],
    "store": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "suffix": "the end",
    "temperature": 0.5,
    "tool_choice": "required",
    "tools": [TOOL],
    "top_logprobs": 2,
    "top_p": 0.5,
    "user": "me",
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
}
"""For each field a value that asks for something else than its absence does."""
WITH: dict[str, dict[str, Any]] = {
    "parallel_tool_calls": {"tools": [TOOL]},
    "stream_options": {"stream": True},
    "tool_choice": {"tools": [TOOL]},
    "top_logprobs": {"logprobs": True},
}
"""What a field is about only beside."""


def fields_of(*types: Any) -> list[str]:
    return sorted({name for kind in types for name in typing.get_type_hints(kind)})


def outcome(parse: Any, body: dict[str, Any]) -> ChatRequest | CompletionRequest | str:
    """What is made of a request, or the field that it is refused for."""
    try:
        request: ChatRequest | CompletionRequest = parse(Fields(body))
    except ApiError as error:
        return (error.param if error.status == 400 else None) or "refused, but not as it should be"
    return request


def is_honoured_or_refused(parse: Any, base: dict[str, Any], field: str, value: Any) -> bool:
    base = base | WITH.get(field, {})
    found = outcome(parse, base | {field: value})
    return found == field if isinstance(found, str) else found != outcome(parse, base)


@pytest.mark.parametrize(
    "field", fields_of(chats.CompletionCreateParamsNonStreaming, chats.CompletionCreateParamsStreaming)
)
def test_a_field_of_a_chat(field: str) -> None:
    assert is_honoured_or_refused(parse_chat, CHAT, field, SAMPLES[field]) != (field in LABELS)


@pytest.mark.parametrize(
    "field", fields_of(completions.CompletionCreateParamsNonStreaming, completions.CompletionCreateParamsStreaming)
)
def test_a_field_of_a_completion(field: str) -> None:
    value = 2 if field == "logprobs" else SAMPLES[field]
    assert is_honoured_or_refused(parse_completion, COMPLETION, field, value) != (field in LABELS)


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_refused_is_accepted_where_it_asks_for_nothing(field: str) -> None:
    for value in (None, False, "", [], {}, *UNSUPPORTED[field].plain):
        assert parse_chat(Fields(CHAT | {field: value})) == parse_chat(Fields(CHAT))
        assert parse_completion(Fields(COMPLETION | {field: value})) == parse_completion(Fields(COMPLETION))


MESSAGE_SAMPLES: dict[str, Any] = {
    "audio": {"id": "a"},
    "content": "Bye",
    "function_call": {"name": "f", "arguments": "{}"},
    "name": "Ada",
    "refusal": "No",
    "tool_call_id": "c",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
ROLES = {
    kind.__name__.removeprefix("ChatCompletion").removesuffix("MessageParam").lower(): kind
    for kind in typing.get_args(messages.ChatCompletionMessageParam)
}


@pytest.mark.parametrize(
    ("role", "field"), [(role, field) for role, kind in ROLES.items() for field in fields_of(kind) if field != "role"]
)
def test_a_field_of_a_message(role: str, field: str) -> None:
    """A refusal counts where there is no content: beside one, there is none."""
    message = {"role": role} if field == "refusal" else {"role": role, "content": "Hello"}
    base, asked = ({**CHAT, "messages": [found]} for found in (message, message | {field: MESSAGE_SAMPLES[field]}))
    before, after = outcome(parse_chat, base), outcome(parse_chat, asked)
    if role == "function":
        assert before == after == "messages[0].role"
    elif isinstance(after, str):
        assert after == f"messages[0].{field}"
    else:
        assert after != before


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
    ],
)
def test_what_stands_within_a_field_counts_as_well(asked: dict[str, Any], param: str) -> None:
    assert outcome(parse_chat, CHAT | asked) == param
