"""What is asked of a generation, and what comes of it: data alone."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llmasos.blocks.sampling import SamplingParams, Scored
from llmasos.client.trace import Trace
from llmasos.errors import UsageError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate. Lengths are in tokens; `max_length` counts the prompt, as in transformers.

    Raises UsageError for lengths that cannot be.
    """

    prompt: str
    max_length: int | None = None
    max_new_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    return_full_text: bool = False
    logprobs: int | None = None
    """Score each token, with so many of the likeliest beside it; 0 for itself only."""
    score_prompt: bool = False
    """Score the prompt as well. It is then computed whole, whatever the session holds of it."""
    json_schema: str | None = None
    """The text must be JSON that this schema, itself JSON, allows."""
    trace: bool = False
    """Tell where the time went. For that the session must be traced."""

    DEFAULT_NEW_TOKENS = 64

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_new_tokens is not None:
            raise UsageError("max_length and max_new_tokens are both given", hint="give one of them")
        for name in ("max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} is {value!r}: it must be a whole number above zero")
        if any(not text for text in self.stop):
            raise UsageError("a stop text is empty: it would stop before the first token")

    def new_tokens(self, prompt_tokens: int, context_tokens: int) -> int:
        """How many tokens may be generated behind a prompt. Raises UsageError when the context has no room."""
        if prompt_tokens >= context_tokens:
            raise UsageError(
                f"the prompt has {prompt_tokens} tokens, the context of the model {context_tokens}",
                hint="shorten the prompt: at least one position must be left for the answer",
            )
        if self.max_length is not None:
            if self.max_length <= prompt_tokens:
                raise UsageError(
                    f"max_length is {self.max_length}, but the prompt alone has {prompt_tokens} tokens",
                    hint=f"max_length counts the prompt: give at least {prompt_tokens + 1}, or use max_new_tokens",
                )
            return min(self.max_length, context_tokens) - prompt_tokens
        wanted = self.max_new_tokens if self.max_new_tokens is not None else self.DEFAULT_NEW_TOKENS
        return min(wanted, context_tokens - prompt_tokens)


@dataclass(frozen=True, slots=True)
class RoutedHop:
    """A peer of the route, and the blocks it computed."""

    peer: str
    blocks: str


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation. `text` is the completion (behind the prompt, if that was asked for)."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    route: tuple[RoutedHop, ...]
    time_to_first_token_s: float
    tokens_per_s: float
    failovers: int
    trace: Trace | None = None

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`; without a trace if there is none."""
        fields = asdict(self)
        if self.trace is None:
            del fields["trace"]
        return fields


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that no later token changes, and the tokens that it came of, scored if that was asked for.

    `offsets` says where in the completion each of them begins, in characters.
    """

    text: str
    scores: tuple[Scored, ...] = ()
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScores:
    """How likely the model found each token of the prompt."""

    scores: tuple[Scored, ...]
