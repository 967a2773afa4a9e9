"""What the gateway offers, as an OpenAPI document: for people who look, and for tools that try everything in it.

Fields that may be left out may also be null; those that nobody here knows are ignored. Both are said once, in `_body`.
"""

from collections.abc import Sequence
from typing import Any

from llmasos import __version__

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def _one_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _maybe(schema: Schema) -> Schema:
    return _one_of(schema, {"type": "null"})


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": required | (optional or {})}


def _body(required: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    """A request: what may be left out may also be null."""
    return _object(required, {name: _maybe(schema) for name, schema in optional.items()})


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# --- requests --------------------------------------------------------------------------------------------------------

_TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_NAME: Schema = {"type": "string", "minLength": 1}
_FUNCTION = _object({"name": _TEXT}, {"description": _TEXT, "parameters": _OBJECT})
_CALL = _object(
    {"function": _object({"name": _TEXT, "arguments": _TEXT})}, {"id": _TEXT, "type": {"const": "function"}}
)
_PART = _object({"type": {"const": "text"}, "text": _TEXT})
_MESSAGE = _object(
    {"role": {"enum": ["system", "developer", "user", "assistant", "tool"]}, "content": _one_of(_TEXT, _list(_PART))},
    {"name": _NAME, "tool_calls": _list(_CALL), "tool_call_id": _NAME},
)
_FORM = _one_of(
    _object({"type": {"enum": ["text", "json_object"]}}),
    _object({"type": {"const": "json_schema"}, "json_schema": _object({"schema": _OBJECT}, {"name": _TEXT})}),
)
_OPTIONS: dict[str, Schema] = {
    "max_tokens": {"type": "integer", "minimum": 0},
    "temperature": {"type": "number", "minimum": 0, "maximum": 100, "default": 1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
    "top_k": {"type": "integer", "minimum": -1, "default": 0},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 10, "default": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2, "default": 0},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2, "default": 0},
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
    },
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "stop": _one_of(_NAME, _list(_NAME, maxItems=16)),
    "n": {"type": "integer", "minimum": 1, "maximum": 16, "default": 1},
    "stream": {"type": "boolean", "default": False},
    "stream_options": _object({}, {"include_usage": _FLAG}),
    "response_format": _FORM,
}
_CHAT_OPTIONS = _OPTIONS | {
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "logprobs": _FLAG,
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    "tools": _list(_object({"type": {"const": "function"}, "function": _FUNCTION})),
    "tool_choice": {"enum": ["auto", "none"]},
}
_COMPLETION_OPTIONS = _OPTIONS | {
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "echo": _FLAG,
    "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
}
_PROMPT = _one_of(
    _TEXT,
    _list(_TEXT, minItems=1, maxItems=16),
    _list(_TOKEN, minItems=1),
    _list(_list(_TOKEN, minItems=1), minItems=1, maxItems=16),
)

# --- answers ---------------------------------------------------------------------------------------------------------

_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    }
)
_TRACED = _object(
    {
        "total_ms": _NUMBER,
        "hops": _list(
            _object({"peer": _TEXT, "blocks": _TEXT, "queue_ms": _NUMBER, "compute_ms": _NUMBER, "network_ms": _NUMBER})
        ),
        "steps": _list(_object({"begin_ms": _NUMBER, "total_ms": _NUMBER, "position": _COUNT, "tokens": _COUNT})),
    }
)
_REASON = {"enum": ["stop", "length", "tool_calls"]}
_SCORE = _object({"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_COUNT)})
_SCORES = _object({"content": _list(_object({"top_logprobs": _list(_SCORE), **_SCORE["properties"]}))})
_COLUMNS = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_maybe(_NUMBER)),
        "top_logprobs": _list(_maybe(_OBJECT)),
        "text_offset": _list(_COUNT),
    }
)
_SAID = _object({"role": {"const": "assistant"}, "content": _maybe(_TEXT)}, {"tool_calls": _list(_CALL)})
_HOP = _object({"peer": _TEXT, "blocks": _TEXT})


def _answer(kind: str, choice: dict[str, Schema], scores: Schema) -> Schema:
    common = {"index": _COUNT, "logprobs": _maybe(scores), "finish_reason": _REASON}
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(_object(choice | common)),
            "usage": _USAGE,
        },
        {"llmasos": _object({"texts": _list(_OBJECT)}), "llmasos_trace": _list(_maybe(_TRACED))},
    )


_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})
_PEER = _object(
    {
        "peer": _TEXT,
        "name": _TEXT,
        "blocks": _TEXT,
        "state": {"enum": ["joining", "online", "draining"]},
        "throughput": _NUMBER,
        "load": {"type": "number", "minimum": 0, "maximum": 1},
        "kv_free_tokens": _COUNT,
        "dtype": _TEXT,
        "quantization": _TEXT,
        "version": _TEXT,
        "age_s": _NUMBER,
    }
)
_SWARM_MODEL = _object(
    {"model": _TEXT, "blocks": _COUNT, "covered": _FLAG, "missing": _list(_TEXT), "peers": _list(_PEER)}
)
_SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "param": _maybe(_TEXT), "code": _maybe(_TEXT)})}
    ),
    "ChatCompletion": _answer("chat.completion", {"message": _SAID}, _SCORES),
    "Completion": _answer("text_completion", {"text": _TEXT}, _COLUMNS),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "Tokens": _object(
        {"count": _COUNT, "max_model_len": _COUNT, "tokens": _list(_COUNT)}, {"token_strs": _list(_maybe(_TEXT))}
    ),
    "Text": _object({"prompt": _TEXT}),
    "TokenizerInfo": _object({"model": _TEXT, "tokenizer_class": _TEXT, "vocab_size": _COUNT}),
    "Swarm": _object({"models": _list(_SWARM_MODEL)}),
    "Activity": _object(
        {
            "now": _NUMBER,
            "swarm_age_s": _maybe(_NUMBER),
            "running": _list(_object({"model": _TEXT, "tokens": _COUNT, "route": _list(_HOP)})),
            "waiting": _COUNT,
            "failovers": _list(
                _object({"at": _NUMBER, "model": _TEXT, "lost": _list(_HOP), "now": _list(_HOP), "why": _TEXT})
            ),
            "samples": _list(_object({"at": _NUMBER, "tokens_per_s": _NUMBER}, {"time_to_first_token_s": _NUMBER})),
            "rtt_s": {"type": "object", "additionalProperties": _NUMBER},
            "relayed": _list(_TEXT),
            "join": _list(_TEXT),
        }
    ),
    "Health": _object({"status": {"enum": ["ok", "failed"]}, "running": _COUNT}),
}

# --- the document ----------------------------------------------------------------------------------------------------

_TRACE = {
    "name": "x-llmasos-trace",
    "in": "header",
    "description": "route: a field `llmasos` of the answer says how each text came to be. 1: `llmasos_trace` says "
    "where its time went, too.",
    "schema": {"enum": ["0", "1", "route"]},
}
_REQUEST_ID = {
    "name": "x-request-id",
    "in": "header",
    "description": "A name for the request: up to 128 letters, digits and `_.:-`. Anything else is replaced.",
    "schema": _TEXT,
}
_HEADERS: dict[str, Any] = {
    "x-request-id": {"description": "The name of the request in the gateway's log.", "required": True, "schema": _TEXT}
}
_RETRY_AFTER: dict[str, Any] = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}
}
_CHALLENGE: dict[str, Any] = {"WWW-Authenticate": {"schema": {"const": "Bearer"}}}
_REFUSALS = {
    "400": "A field is wrong, or cannot be honoured: `param` names it.",
    "401": "No API key, or one that is not known.",
    "403": "The key may not do this.",
    "404": "There is no such model, or no such path.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "417": "An `Expect` header asks for something else than 100-continue.",
    "429": "A limit of the key; `Retry-After` says when to come back.",
    "503": "Blocks are missing, or the gateway is full; the message says what to do.",
}
_EXTRA = {"401": _CHALLENGE, "429": _RETRY_AFTER, "503": _RETRY_AFTER}


def document(models: Sequence[str]) -> dict[str, Any]:
    """The document of /openapi.json, with the names of the models that can be used now where one may know them."""
    name: Schema = {"type": "string", "enum": list(models)} if models else _TEXT
    chat = _body({"model": name, "messages": _list(_MESSAGE, minItems=1)}, _CHAT_OPTIONS)
    completion = _body({"model": name, "prompt": _PROMPT}, _COMPLETION_OPTIONS)
    flags = {"add_special_tokens": _FLAG, "return_token_strs": _FLAG}
    tokenize = _one_of(
        _body({"prompt": _TEXT}, {"model": name, **flags}),
        _body({"messages": _list(_MESSAGE, minItems=1)}, {"model": name, **flags}),
    )
    detokenize = _body({"tokens": _list(_TOKEN)}, {"model": name})
    path = {"name": "model", "in": "path", "required": True, "schema": name}
    query = {"name": "model", "in": "query", "schema": name}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLMasOS gateway", "version": __version__},
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "responses": {
                status: _response(said, _ref("Error"), headers=_EXTRA.get(status)) for status, said in _REFUSALS.items()
            },
        },
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/models": {"get": _operation("The models whose blocks all have a peer.", "Models")},
            "/v1/models/{model}": {"get": _operation("One of them.", "Model", parameters=[path])},
            "/v1/chat/completions": {"post": _operation("Go on with a conversation.", "ChatCompletion", body=chat)},
            "/v1/completions": {"post": _operation("Go on with a text.", "Completion", body=completion)},
            "/tokenize": {"post": _operation("The tokens of a text.", "Tokens", body=tokenize)},
            "/detokenize": {"post": _operation("The text of tokens.", "Text", body=detokenize)},
            "/tokenizer_info": {"get": _operation("What the tokenizer is.", "TokenizerInfo", parameters=[query])},
            "/api/swarm": {"get": _operation("What the swarm serves.", "Swarm")},
            "/api/activity": {"get": _operation("What is going on here.", "Activity")},
            "/health": {"get": _operation("Whether the gateway lives.", "Health", refused={"503": "It does not."})},
            "/metrics": {"get": _operation("Counters for Prometheus.", kind="text/plain")},
            "/openapi.json": {"get": _operation("This document.")},
            "/": {"get": _operation("The page.", kind="text/html")},
        },
    }


def _response(
    said: str, schema: Schema | None = None, kind: str = "application/json", headers: dict[str, Any] | None = None
) -> dict[str, Any]:
    content = {kind: {"schema": schema} if schema else {}}
    return {"description": said, "headers": _HEADERS | (headers or {}), "content": content}


def _operation(
    summary: str,
    answer: str | None = None,
    *,
    body: Schema | None = None,
    parameters: Sequence[dict[str, Any]] = (),
    kind: str = "application/json",
    refused: dict[str, str] | None = None,
) -> dict[str, Any]:
    schema = _ref(answer) if answer else None
    responses = {"200": _response("The answer.", schema, kind)}
    responses |= {status: {"$ref": f"#/components/responses/{status}"} for status in _REFUSALS}
    responses |= {status: _response(said, schema) for status, said in (refused or {}).items()}
    generates = answer in ("ChatCompletion", "Completion")
    named = [*parameters, _REQUEST_ID, *([_TRACE] if generates else [])]
    made: dict[str, Any] = {"summary": summary, "parameters": named, "responses": responses}
    if body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        if generates:
            responses["200"]["content"]["text/event-stream"] = {}
    return made
