"""The OpenAI interface, answers: what was generated, as JSON objects. Pure: no HTTP, no torch, no swarm."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of an answer have in common."""

    id: str
    created: int
    model: str
    chat: bool

    def body(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """An answer, or a chunk of one, with these choices."""
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token as the interface shows it: its text, its bytes, where it begins, and how likely it was."""

    text: str
    raw: bytes
    logprob: float | None
    top: tuple["TokenScore", ...] = ()
    offset: int = 0


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """How many tokens a request took; `cached_tokens` of its prompts were not computed again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants to be called."""

    name: str
    arguments: str
    id: str

    def body(self) -> dict[str, Any]:
        """As part of a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(slots=True)
class Choice:
    """One text of an answer, gathered: what an answer in one piece shows."""

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"


def whole_choice(head: Head, index: int, choice: Choice, *, scored: bool) -> dict[str, Any]:
    """A choice of an answer in one piece."""
    logprobs = _logprobs(head, choice.scores) if scored else None
    shown: dict[str, Any] = {"index": index}
    if head.chat:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": [call.body() for call in choice.calls]}
        shown["message"] = message
    else:
        shown["text"] = choice.text
    return shown | {"logprobs": logprobs, "finish_reason": choice.finish_reason}


def part_of_choice(
    head: Head,
    index: int,
    text: str | None,
    *,
    first: bool = False,
    scores: Sequence[TokenScore] | None = None,
    calls: Sequence[tuple[int, ToolCall]] = (),
    finish_reason: str | None = None,
) -> dict[str, Any]:
    """A choice in a chunk of a stream; `text` None says nothing, as the last chunk does."""
    shown: dict[str, Any] = {"index": index}
    if head.chat:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text is not None:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = [{"index": number, **call.body()} for number, call in calls]
        shown["delta"] = delta
    else:
        shown["text"] = text or ""
    return shown | {"logprobs": _logprobs(head, scores) if scores else None, "finish_reason": finish_reason}


def _logprobs(head: Head, scores: Sequence[TokenScore]) -> dict[str, Any]:
    if head.chat:
        return {"content": [_chat_score(score) for score in scores], "refusal": None}
    return {
        "tokens": [_named(score) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_alternatives(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _chat_score(score: TokenScore) -> dict[str, Any]:
    def plain(one: TokenScore) -> dict[str, Any]:
        return {"token": _named(one), "logprob": one.logprob, "bytes": list(one.raw)}

    return plain(score) | {"top_logprobs": [plain(other) for other in score.top]}


def _alternatives(score: TokenScore) -> dict[str, float | None] | None:
    """The likeliest, and the token that was chosen whether it was among them or not."""
    if score.logprob is None:
        return None
    return {_named(other): other.logprob for other in score.top} | {_named(score): score.logprob}


def _named(score: TokenScore) -> str:
    """The token's text; bytes that are no text by themselves in the notation that OpenAI uses, so that names differ."""
    if "\ufffd" not in score.text:
        return score.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.raw)


# --- tool calls -----------------------------------------------------------------------------------------------------

CALL_BEGINS = "<tool_call>"
CALL_ENDS = "</tool_call>"
"""How the templates of Qwen, Hermes and SmolLM have a model write a call: JSON between these."""


class ToolCalls:
    """Takes the calls out of a text that comes in pieces. What may become a call is held back."""

    def __init__(self, prefix: str) -> None:
        self.calls: list[ToolCall] = []
        self._prefix = prefix
        self._held = ""

    def add(self, piece: str) -> str:
        """The text that is certain to be no part of a call."""
        self._held += piece
        given = ""
        while True:
            before, begins, rest = self._held.partition(CALL_BEGINS)
            if not begins:
                keep = next((n for n in range(len(CALL_BEGINS) - 1, 0, -1) if before.endswith(CALL_BEGINS[:n])), 0)
                self._held = before[len(before) - keep :]
                return given + before[: len(before) - keep]
            inside, ends, behind = rest.partition(CALL_ENDS)
            if not ends:
                self._held = begins + rest
                return given + before
            call = self._parse(inside)
            given += before if call is not None else before + begins + inside + ends
            if call is not None:
                self.calls.append(call)
            self._held = behind

    def finish(self) -> str:
        """What was held back: a call that was not ended is one nevertheless, if it is whole."""
        held, self._held = self._held, ""
        call = self._parse(held.removeprefix(CALL_BEGINS)) if held.startswith(CALL_BEGINS) else None
        if call is None:
            return held
        self.calls.append(call)
        return ""

    def _parse(self, text: str) -> ToolCall | None:
        try:
            found = json.loads(re.sub(r"^```(?:json)?|```$", "", text.strip()))
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get("arguments", found.get("parameters", {}))
        number = len(self.calls)
        return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False), f"{self._prefix}_{number}")
