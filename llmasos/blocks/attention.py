"""Attention of many sessions in one forward pass, plugged into transformers' attention interface.

The rows of all sessions are laid end to end, `(1, rows, hidden)`, and go through a model class as if they were one
sequence. Two of its seams make that right. `PackedCache` stands in for its kv cache and puts each session's keys and
values into that session's own; `packed_attention` stands in for its attention function and lets each session's
queries see that session's keys alone. Which of them they may see is not decided here: the class asks for a mask, the
mask function that it passes is kept, and it is evaluated at the positions of each session.

What the seams are asked for and do not know (another mask, a bias, an unknown argument) raises `NotPackableError`,
and the model then runs session by session.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from transformers import AttentionInterface, Cache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from llmasos.blocks.kv_cache import SessionCache

NAME = "llmasos"
"""What the attention and the mask function are registered as."""

Given = TypeVar("Given")
Made = TypeVar("Made")
MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Mask = tuple[int, torch.Tensor | None]
"""The first visible key and, from there on, an additive mask of (queries, keys); None when all are visible."""

_HARMLESS = frozenset({"position_ids", "sliding_window", "use_cache", "is_causal", "cache_position"})
"""Arguments that carry nothing the mask does not say already, as in transformers' own sdpa attention."""


class NotPackableError(Exception):
    """The model class asks for something that a packed forward pass does not do."""


@dataclass(slots=True, eq=False)
class Pattern:
    """A mask as its model class describes it: may the query at position q see the key at position k?"""

    visible: MaskFunction
    causal: bool
    """True for "everything up to itself", the one pattern that kernels know by name."""

    def mask(self, position: int, queries: int, like: torch.Tensor) -> Mask:
        """For queries at `[position, position + queries)` over all keys up to the last of them."""
        if self.causal and queries == 1:
            return 0, None
        keys = torch.arange(position + queries, device=like.device)
        zero = torch.zeros((), dtype=torch.long, device=like.device)
        seen = self.visible(zero, zero, keys[position:, None], keys[None, :]).expand(queries, -1)
        start = int(seen.any(dim=0).int().argmax())
        seen = seen[:, start:]
        if bool(seen.all()):
            return start, None
        return start, torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


_CAUSAL = Pattern(causal_mask_function, causal=True)


def pattern_of_mask(
    *, mask_function: MaskFunction = causal_mask_function, attention_mask: Any = None, use_vmap: bool = False, **_: Any
) -> Pattern:
    """What transformers calls to build a mask. Builds none and keeps the description."""
    if attention_mask is not None or use_vmap:
        raise NotPackableError("it asks for a mask of its own making")
    if mask_function is causal_mask_function:
        return _CAUSAL
    return Pattern(mask_function, causal=False)


@dataclass(slots=True)
class Slot:
    """The next `tokens` rows of a packed forward pass: one session's, from `position` on."""

    cache: SessionCache
    position: int
    tokens: int


@dataclass(slots=True)
class PackedStep:
    """One packed forward pass: whose rows are where, and what is being attended to right now."""

    slots: list[Slot]  # in the order of the rows; rows behind them are nobody's
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Per slot: all keys and values of the block that wrote last, (heads, tokens, width)."""
    written: tuple[torch.Tensor, torch.Tensor] | None = None
    """What the block that wrote last has put into the cache; it must attend to just that."""
    notes: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """By the id of what is given to all blocks of the step: itself, and what they have made of it."""

    def once(self, given: Given, make: Callable[[Given], Made]) -> Made:
        """`make(given)`, once for all blocks of this step that are given the same object."""
        found = self.notes.get(id(given))
        if found is None:
            found = self.notes[id(given)] = given, make(given)
        return cast(Made, found[1])

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(heads, rows, width) cut into one piece a slot, and one of what is left."""
        counts = [slot.tokens for slot in self.slots]
        return torch.split(rows, [*counts, rows.shape[1] - sum(counts)], dim=1)

    def mask(self, pattern: Pattern, slot: int, like: torch.Tensor) -> Mask:
        masks = self.once(pattern, _no_masks)
        found = masks.get(slot)
        if found is None:
            where = self.slots[slot]
            found = masks[slot] = pattern.mask(where.position, where.tokens, like)
        return found


def _no_masks(pattern: Pattern) -> dict[int, Mask]:
    """Of one pattern, by slot: what a step knows before its first block."""
    return {}


_step: ContextVar[PackedStep] = ContextVar("llmasos_packed_step")


class PackedCache(Cache):  # type: ignore[misc]
    """Looks like a kv cache to a model class; the kv goes into the caches of the sessions of `step`."""

    def __init__(self, step: PackedStep) -> None:
        super().__init__(layers=[])
        self.step = step

    def __enter__(self) -> "PackedCache":
        self._token = _step.set(self.step)
        return self

    def __exit__(self, *_: object) -> None:
        _step.reset(self._token)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, heads, rows, width) each. Returns them unchanged: what is attended to lies in `step.seen`."""
        if self.step.written is not None:
            raise NotPackableError("a block writes its kv twice")
        self.step.written = key_states, value_states
        keys, values = self.step.split(key_states[0]), self.step.split(value_states[0])
        for slot, new_keys, new_values in zip(self.step.slots, keys, values, strict=False):
            self.step.seen.append(slot.cache.block(layer_idx).write(slot.position, new_keys, new_values))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class SessionView(Cache):  # type: ignore[misc]
    """The kv of one session as the kv cache that any model class understands."""

    def __init__(self, cache: SessionCache, position: int) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self.position = position

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, heads, rows, width) each; returns all keys and values of the block."""
        keys, values = self.cache.block(layer_idx).write(self.position, key_states[0], value_states[0])
        return keys[None], values[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.position + query_length, 0


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, query heads, rows, width)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Pattern | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Each session's queries over that session's keys. Returns (1, rows, query heads, value width)."""
    unknown = [name for name, given in kwargs.items() if name not in _HARMLESS and not _is_off(given)]
    if unknown or dropout:
        raise NotPackableError(f"its attention wants {', '.join(unknown) or 'dropout'}")
    if attention_mask is None and not getattr(module, "is_causal", True):
        raise NotPackableError("its attention is not causal")
    step = _step.get()
    if step.written is None or step.written[0] is not key or step.written[1] is not value:
        raise NotPackableError("it attends to something else than what it puts into the kv cache")
    pattern = attention_mask or _CAUSAL
    *queries, rest = step.split(query[0])  # (query heads, tokens, width) each
    attended = []
    for index, (rows, (keys, values)) in enumerate(zip(queries, step.seen, strict=True)):
        if softcap is None and s_aux is None:
            attended.append(_attend(rows, keys, values, pattern, step, index, scaling))
        else:
            mask = step.mask(pattern, index, rows)
            attended.append(_attend_explicitly(rows, keys, values, mask, scaling, softcap=softcap, sinks=s_aux))
    step.seen.clear()
    step.written = None
    attended.append(rest.new_zeros(rest.shape[0], rest.shape[1], value.shape[3]))
    return torch.cat(attended, dim=1).transpose(0, 1)[None], None


def _is_off(given: Any) -> bool:
    return given is None or given is False


def _attend(
    query: torch.Tensor,  # (query heads, tokens, width)
    keys: torch.Tensor,  # (heads, length, width)
    values: torch.Tensor,
    pattern: Pattern,
    step: PackedStep,
    slot: int,
    scaling: float | None,
) -> torch.Tensor:
    """By torch's fused kernel. Query heads that share a key head are laid out as more queries of that head."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads, tokens = keys.shape[0], query.shape[1]
    group = query.shape[0] // heads
    if pattern.causal and tokens == keys.shape[1] and tokens > 1:
        return sdpa(query[None], keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=group > 1)[0]
    start, mask = step.mask(pattern, slot, query)
    if mask is not None and group > 1:
        mask = mask.repeat(group, 1)  # (group x tokens, length)
    if start:
        keys, values = keys[:, start:], values[:, start:]
    grouped = query.reshape(1, heads, group * tokens, query.shape[2])
    out = sdpa(grouped, keys[None], values[None], attn_mask=mask, scale=scaling)
    return out.reshape(query.shape[0], tokens, values.shape[2])


def _attend_explicitly(
    query: torch.Tensor,  # (query heads, tokens, width)
    keys: torch.Tensor,  # (heads, length, width)
    values: torch.Tensor,
    where: Mask,
    scaling: float | None,
    *,
    softcap: float | None,
    sinks: torch.Tensor | None,  # (query heads,): a score for attending to nothing
) -> torch.Tensor:
    """With what the fused kernel cannot do: capped scores and attention sinks."""
    start, mask = where
    heads, tokens = keys.shape[0], query.shape[1]
    group = query.shape[0] // heads
    scale = query.shape[2] ** -0.5 if scaling is None else scaling
    # A copy, so that neither strides nor alignment depend on where in the batch the rows lie: products would too.
    grouped = query.clone(memory_format=torch.contiguous_format).view(heads, group * tokens, query.shape[2])
    scores = (grouped @ keys[:, start:].transpose(1, 2) * scale).view(heads, group, tokens, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(heads, group, 1, 1).expand(-1, -1, tokens, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    out = weights.reshape(heads, group * tokens, -1) @ values[:, start:]
    return out.view(query.shape[0], tokens, values.shape[2])


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, pattern_of_mask)
