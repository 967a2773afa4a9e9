"""What the gateway offers, as an OpenAPI document: for people who look, and for tools that try everything in it."""

from typing import Any

from llmasos import __version__

_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}
_NUMBER = {"type": "number"}
_FLAG = {"type": "boolean"}
_OBJECT = {"type": "object"}
_ERROR = {"$ref": "#/components/schemas/Error"}

_OPTIONS: dict[str, Any] = {
    "model": _TEXT,
    "max_tokens": {"type": "integer", "minimum": 0},
    "temperature": {"type": "number", "minimum": 0, "maximum": 100, "default": 1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
    "top_k": {"type": "integer", "minimum": -1, "default": 0},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 10, "default": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2, "default": 0},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2, "default": 0},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "seed": _WHOLE,
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 16}]},
    "n": {"type": "integer", "minimum": 1, "maximum": 16, "default": 1},
    "stream": _FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
    "response_format": _OBJECT,
}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def document() -> dict[str, Any]:
    """The document of /openapi.json."""
    message = {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT}, {"type": "null"}]},
        },
    }
    messages = {"type": "array", "minItems": 1, "items": message}
    chat = _OPTIONS | {
        "messages": messages,
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "logprobs": _FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "tools": {"type": "array", "items": _OBJECT},
        "tool_choice": {"enum": ["auto", "none"]},
    }
    completion = _OPTIONS | {
        "prompt": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, _TOKENS, {"type": "array", "items": _TOKENS}]},
        "echo": _FLAG,
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    }
    tokenize = {"model": _TEXT, "prompt": _TEXT, "messages": messages, "add_special_tokens": _FLAG}
    model = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    query = {"name": "model", "in": "query", "schema": _TEXT}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLMasOS gateway", "version": __version__},
        "components": {
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": _OBJECT}}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/models": {"get": _operation("The models whose blocks all have a peer.")},
            "/v1/models/{model}": {"get": _operation("One of them.", parameters=[model])},
            "/v1/chat/completions": {"post": _operation("Go on with a conversation.", chat, ["model", "messages"])},
            "/v1/completions": {"post": _operation("Go on with a text.", completion, ["model", "prompt"])},
            "/tokenize": {"post": _operation("The tokens of a text.", tokenize)},
            "/detokenize": {"post": _operation("The text of tokens.", {"model": _TEXT, "tokens": _TOKENS}, ["tokens"])},
            "/tokenizer_info": {"get": _operation("What the tokenizer is.", parameters=[query])},
            "/api/swarm": {"get": _operation("What the swarm serves.")},
            "/api/activity": {"get": _operation("What is going on here.")},
            "/health": {"get": _operation("Whether the gateway lives.")},
            "/metrics": {"get": _operation("Counters for Prometheus.", answer="text/plain")},
        },
    }


def _operation(
    summary: str,
    body: dict[str, Any] | None = None,
    required: list[str] | None = None,
    *,
    parameters: list[dict[str, Any]] | None = None,
    answer: str = "application/json",
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": {answer: {}}},
            "default": {"description": "What is wrong.", "content": {"application/json": {"schema": _ERROR}}},
        },
    }
    if body is not None:
        made["responses"]["200"]["content"]["text/event-stream"] = {}
        schema = {"type": "object", "properties": body, "required": required or []}
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if parameters:
        made["parameters"] = parameters
    return made
