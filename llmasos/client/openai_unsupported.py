"""The OpenAI interface, what is known to others and cannot be done here: refused by name, never dropped.

Values that ask for nothing - false, null, empty ones, and those in `plain` - are accepted.
"""

from dataclasses import dataclass
from typing import Any

from llmasos.client.openai_fields import ApiError, Fields


@dataclass(frozen=True, slots=True)
class _Refusal:
    why: str
    plain: tuple[Any, ...] = ()


_CONSTRAIN = _Refusal("use response_format with a json_schema")
_SETTING = "models here take no such setting"

UNSUPPORTED = {
    # OpenAI's
    "audio": _Refusal("only text is generated"),
    "best_of": _Refusal("generate n choices and choose among them"),
    "function_call": _Refusal("use tool_choice", ("auto", "none")),
    "functions": _Refusal("use tools"),
    "moderation": _Refusal("texts are not judged"),
    "prediction": _Refusal("predicted outputs are not used"),
    "prompt_cache_options": _Refusal("peers keep the beginnings of prompts as long as they have room"),
    "prompt_cache_retention": _Refusal("peers keep the beginnings of prompts in memory only", ("in_memory",)),
    "reasoning_effort": _Refusal(_SETTING, ("none",)),
    "service_tier": _Refusal("there is one tier", ("auto", "default")),
    "store": _Refusal("nothing is stored"),
    "suffix": _Refusal("text cannot be filled in, only gone on with"),
    "verbosity": _Refusal(_SETTING, ("medium",)),
    "web_search_options": _Refusal("there is no web search"),
    # those of other servers, which their clients send as extra fields
    "allowed_token_ids": _Refusal("use logit_bias"),
    "bad_words": _Refusal("use logit_bias"),
    "chat_template": _Refusal("a model's own template is used"),
    "chat_template_kwargs": _Refusal("a model's own template is used, as it is"),
    "continue_final_message": _Refusal("an answer is a new message: use /v1/completions"),
    "grammar": _CONSTRAIN,
    "guided_choice": _CONSTRAIN,
    "guided_grammar": _CONSTRAIN,
    "guided_json": _CONSTRAIN,
    "guided_regex": _CONSTRAIN,
    "ignore_eos": _Refusal("use logit_bias against the end of text"),
    "include_stop_str_in_output": _Refusal("stop texts are left out"),
    "length_penalty": _Refusal("there is no beam search", (1,)),
    "min_tokens": _Refusal("use logit_bias against the end of text"),
    "prompt_logprobs": _Refusal("use echo with logprobs"),
    "stop_token_ids": _Refusal("use stop, with texts"),
    "structured_outputs": _CONSTRAIN,
    "truncate_prompt_tokens": _Refusal("prompts are taken whole"),
    "typical_p": _Refusal("use top_p or min_p", (1,)),
    "use_beam_search": _Refusal("there is no beam search"),
}

LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")
"""They say who asks or what for, and change no answer: accepted."""


def refuse_unsupported(body: Fields) -> None:
    """Raises ApiError, which names the field and says what to do instead."""
    for field, refusal in UNSUPPORTED.items():
        value = body.get(field)
        if not value or value in refusal.plain:
            continue
        if field == "best_of" and value == (body.get("n") or 1):  # the best n of n are all of them
            continue
        raise ApiError(f"{field} is not supported: {refusal.why}", param=field, code="unsupported_parameter")
