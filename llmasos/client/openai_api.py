"""The OpenAI interface, requests: JSON in, frozen dataclasses out. Pure: no HTTP, no torch, no swarm.

What is unknown is ignored, as forward compatibility wants; `null` means "not given". What is known and cannot be
honoured raises an ApiError that names `param`; nothing that was asked for is dropped.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from llmasos.client.openai_fields import ApiError, Fields, shown
from llmasos.client.openai_unsupported import refuse_unsupported

MAX_CHOICES = 16
"""Of one request, over all of its prompts: each is a session of its own."""
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to generate, whatever the prompt is. `logprobs` is a number of alternatives, None for no scores at all."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int | None
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None = None
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to go on with. `messages` and `tools` are as the model's template takes them."""

    model: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    options: Options


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Prompts to go on with, each a text or token ids."""

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    options: Options


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A text or a conversation to count the tokens of."""

    model: str | None
    prompt: str | None
    messages: tuple[dict[str, Any], ...]
    add_special_tokens: bool
    return_token_strs: bool


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    """Tokens to write out."""

    model: str | None
    tokens: tuple[int, ...]


def parse_chat(body: Fields) -> ChatRequest:
    """A request to /v1/chat/completions."""
    refuse_unsupported(body)
    modalities = body.get("modalities")
    if modalities not in (None, [], ["text"]):
        raise body.wrong("modalities", '["text"]: only text is generated')
    logprobs = body.whole("top_logprobs", 0, MAX_LOGPROBS)
    if body.flag("logprobs"):
        logprobs = logprobs or 0
    elif logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    else:
        logprobs = None
    tools = _tools(body)
    return ChatRequest(body.text("model"), _messages(body), tools, _options(body, logprobs))


def parse_completion(body: Fields) -> CompletionRequest:
    """A request to /v1/completions."""
    refuse_unsupported(body)
    for field in ("tools", "messages"):
        if body.get(field):
            raise ApiError(f"{field} belongs to /v1/chat/completions", param=field)
    options = _options(body, body.whole("logprobs", 0, MAX_LOGPROBS))
    echo = body.flag("echo")
    if options.max_tokens == 0 and not echo:
        raise ApiError("max_tokens is 0: without echo there is nothing to answer", param="max_tokens")
    prompts = _prompts(body)
    if len(prompts) * options.n > MAX_CHOICES:
        field = "n" if len(prompts) == 1 else "prompt"
        raise ApiError(f"{len(prompts)} prompts with n={options.n} are more than {MAX_CHOICES} choices", param=field)
    return CompletionRequest(body.text("model"), prompts, echo, options)


def parse_tokenize(body: Fields) -> TokenizeRequest:
    """A request to /tokenize: `prompt`, or `messages`."""
    prompt = body.get("prompt")
    if (prompt is None) == (body.get("messages") is None):
        raise ApiError("give prompt or messages, one of them", param="prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise body.wrong("prompt", "a text")
    return TokenizeRequest(
        model=None if body.get("model") is None else body.text("model"),
        prompt=prompt,
        messages=() if prompt is not None else _messages(body),
        add_special_tokens=body.flag("add_special_tokens", default=prompt is not None),
        return_token_strs=body.flag("return_token_strs"),
    )


def parse_detokenize(body: Fields) -> DetokenizeRequest:
    """A request to /detokenize."""
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(_is_token(token) for token in tokens):
        raise body.wrong("tokens", "a list of token ids")
    return DetokenizeRequest(None if body.get("model") is None else body.text("model"), tuple(tokens))


# --- parts ----------------------------------------------------------------------------------------------------------


def _options(body: Fields, logprobs: int | None) -> Options:
    max_tokens = body.whole("max_tokens", 0)
    newer = body.whole("max_completion_tokens", 1)
    if max_tokens is not None and newer is not None and max_tokens != newer:
        raise ApiError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    stream = body.flag("stream")
    stream_options = body.inner("stream_options")
    if stream_options is not None and not stream:
        raise ApiError("stream_options is only for stream=true", param="stream_options")
    if stream_options is not None and stream_options.flag("include_obfuscation"):
        name = stream_options.name("include_obfuscation")
        raise ApiError(f"{name} is not supported: chunks are as long as their text", param=name)
    return Options(
        max_tokens=newer if max_tokens is None else max_tokens,
        temperature=body.number("temperature", 1.0, 0.0, 100.0),
        top_p=_share(body, "top_p"),
        top_k=max(body.whole("top_k", -1) or 0, 0),  # -1 means "no limit" to some clients, as 0 does
        min_p=body.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=body.number("repetition_penalty", 1.0, 0.01, 10.0),
        presence_penalty=body.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=body.number("frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(body),
        seed=body.whole("seed", -(2**63), 2**63 - 1),
        stop=_stop(body),
        n=body.whole("n", 1, MAX_CHOICES) or 1,
        stream=stream,
        include_usage=stream_options.flag("include_usage") if stream_options is not None else False,
        logprobs=logprobs,
        json_schema=_json_schema(body),
    )


def _share(body: Fields, field: str) -> float:
    value = body.number(field, 1.0, 0.0, 1.0)
    if value == 0.0:
        raise body.wrong(field, "above 0 and at most 1")
    return value


def _stop(body: Fields) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > MAX_STOPS
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise body.wrong("stop", f"a text, or a list of at most {MAX_STOPS} texts, none empty")
    return tuple(texts)


def _logit_bias(body: Fields) -> tuple[tuple[int, float], ...]:
    value = body.get("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise body.wrong("logit_bias", f"an object of at most {MAX_BIASES} token ids and what is added to their scores")
    biases = []
    for token, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not (token.isascii() and token.isdigit() and len(token) < 10 and number):
            raise ApiError(
                f"logit_bias takes token ids and numbers from -100 to 100, not {shown(token)}: {shown(bias)}",
                param="logit_bias",
            )
        biases.append((int(token), float(bias)))
    return tuple(biases)


def _json_schema(body: Fields) -> str | None:
    wanted = body.inner("response_format")
    if wanted is None:
        return None
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            return '{"type": "object"}'
        case "json_schema":
            holder = wanted.inner("json_schema")
            schema = holder.get("schema") if holder is not None else None
            if not isinstance(schema, dict):
                raise ApiError(
                    "response_format.json_schema.schema must be a JSON schema",
                    param="response_format.json_schema.schema",
                )
            return msgspec.json.encode(schema).decode()
    raise wanted.wrong("type", "text, json_object or json_schema")


def _prompts(body: Fields) -> tuple[str | tuple[int, ...], ...]:
    value = body.get("prompt")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(_is_token(item) for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item and all(_is_token(token) for token in item) for item in value):
            return tuple(tuple(item) for item in value)
    raise body.wrong("prompt", "a text, a list of texts, a list of token ids, or a list of such lists")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


ROLES = ("system", "developer", "user", "assistant", "tool")


def _messages(body: Fields) -> tuple[dict[str, Any], ...]:
    value = body.get("messages")
    if not isinstance(value, list) or not value:
        raise body.wrong("messages", "a list of at least one message")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ApiError(f"{where} must be an object, not {shown(value)}", param=where)
    fields = Fields(value, where)
    role = fields.get("role")
    if role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    for field in ("audio", "function_call"):
        if fields.get(field):
            raise ApiError(f"{fields.name(field)} is not supported", param=fields.name(field))
    message["content"] = _content(fields, optional=role == "assistant" and bool(fields.get("tool_calls")))
    for field in ("name", "tool_call_id"):
        if fields.get(field) is not None:
            message[field] = fields.text(field)
    if fields.get("tool_calls"):
        message["tool_calls"] = _past_calls(fields)
    return message


def _content(fields: Fields, *, optional: bool) -> str:
    value = fields.get("content")
    if value is None:
        value = fields.get("refusal")  # what an assistant said in the place of an answer
    if value is None and optional:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.wrong("content", "a text or a list of parts")
    texts = []
    for index, part in enumerate(value):
        where = f"{fields.name('content')}[{index}]"
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ApiError(f"{where} must be of type text, not {shown(kind)}", param=f"{where}.type")
        texts.append(Fields(part, where).get(part["type"]))
        if not isinstance(texts[-1], str):
            raise ApiError(f"{where}.{part['type']} must be a text", param=f"{where}.{part['type']}")
    return "".join(texts)


def _past_calls(fields: Fields) -> list[dict[str, Any]]:
    """Tool calls of an earlier turn. Templates want the arguments as an object, the interface sends them as text."""
    calls = fields.get("tool_calls")
    made = []
    for index, call in enumerate(calls if isinstance(calls, list) else [None]):
        where = f"{fields.name('tool_calls')}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"{where} must be a call of a function", param=where)
        arguments = function.get("arguments") or "{}"
        try:
            arguments = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
        except msgspec.DecodeError as error:
            raise ApiError(f"{where}.function.arguments is not JSON: {error}", param=where) from error
        made.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made


def _tools(body: Fields) -> tuple[dict[str, Any], ...]:
    tools = body.get("tools") or []
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise body.wrong("tool_choice", "auto or none: a model cannot be forced to call")
    if body.get("parallel_tool_calls") is False and tools:
        raise ApiError("parallel_tool_calls cannot be switched off", param="parallel_tool_calls")
    if not isinstance(tools, list):
        raise body.wrong("tools", "a list of functions")
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"{where} must be of type function, with a name", param=where)
        if function.get("strict"):
            raise ApiError(f"{where}: calls cannot be held to a schema", param=f"{where}.function.strict")
    return () if choice == "none" else tuple(tools)
