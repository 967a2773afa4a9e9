"""What a model class hands to its layers: the angles that heads are rotated by, and which positions they see.

Both are taken from the class itself: it runs once, without weights, with a note-taker in the place of each layer. So
every kind of rotary embedding is right that gives each position its own angles, and the layers of a family may differ.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmasos.blocks.anatomy import MISFITS, Anatomy, context_tokens
from llmasos.blocks.attention import PackedCache, PackedStep, Pattern
from llmasos.blocks.chain import Chain, Finished
from llmasos.blocks.llama_shape import MisfitError
from llmasos.span import Span

_FIRST_POSITIONS = 1024
"""Tables begin with so many positions, enough for a trial, and double when they are outgrown."""


@dataclass(slots=True)
class Given:
    """To one layer, for the positions [0, n)."""

    cosines: torch.Tensor  # (n, width)
    sines: torch.Tensor
    pattern: Pattern | None


class Angles:
    """What rotating layers are rotated by: as many tables as there are different ones, which grow by need."""

    def __init__(self, body: Anatomy, chain: Chain, span: Span, rotating: Iterable[int], dtype: torch.dtype) -> None:
        """`rotating` are the blocks of `span` that rotate. Raises MisfitError where the class hands over other things
        than angles and a mask.
        """
        self._body = body
        self._chain = chain
        self._span = span
        self._dtype = dtype
        self._context, self._ends_there = context_tokens(body.model.config)
        given = self._ask(self._bounded(_FIRST_POSITIONS))
        self.patterns = {index: item.pattern for index, item in given.items()}
        """By block."""
        self.table_of: dict[int, int] = {}
        """By block: the place of its table in `tables`."""
        self._makers: list[int] = []  # by table: a block that has it
        for index in sorted(rotating):
            mine = given[index].cosines
            same = [table for table, maker in enumerate(self._makers) if torch.equal(given[maker].cosines, mine)]
            self.table_of[index] = same[0] if same else len(self._makers)
            if not same:
                self._makers.append(index)
        self._take(given)

    def cover(self, positions: int) -> bool:
        """Have tables for at least `positions` positions. Whether they had to be made anew."""
        if positions <= self.positions:
            return False
        self._take(self._ask(self._bounded(max(positions, 2 * self.positions))))
        return True

    def _bounded(self, positions: int) -> int:
        """Angles that change behind the context are not asked for there."""
        return min(positions, self._context) if self._ends_there else positions

    def _take(self, given: dict[int, Given]) -> None:
        self.positions = len(given[self._span.start].cosines)
        self.tables = [(given[maker].cosines, given[maker].sines) for maker in self._makers]
        """Cosines and sines, (positions, width) each."""

    @torch.inference_mode()
    def _ask(self, positions: int) -> dict[int, Given]:
        """Raises MisfitError where the class hands over something else."""
        notes: list[dict[str, Any]] = []
        links, self._chain.links = self._chain.links, list(self._chain.links)
        for index in self._span.blocks():
            layer = self._chain.get_submodule(str(index))
            self._chain.links[index] = _NoteTaker(layer, notes.append, index == self._span.end - 1)  # type: ignore[call-overload]
        hidden = torch.zeros(1, positions, 1, dtype=self._dtype)  # of no width: 100,000 whole rows would be gigabytes
        self._chain.feed(hidden, self._span)
        try:
            with PackedCache(PackedStep([])) as cache:
                where = torch.arange(positions)[None]
                self._body.owner(inputs_embeds=hidden, past_key_values=cache, use_cache=True, position_ids=where)
        except Finished:
            return {index: _given(note, positions) for index, note in zip(self._span.blocks(), notes, strict=True)}
        except MISFITS as error:
            raise MisfitError(f"their code does not run without weights ({error})") from error
        finally:
            self._chain.links = links
            self._chain.feed(None, None)
        raise MisfitError("their code runs its layers in an unusual order")


class _NoteTaker:
    """Stands for a layer, and notes what it is called with. Ends the forward pass behind the last one."""

    def __init__(self, layer: nn.Module, note: Callable[[dict[str, Any]], None], last: bool) -> None:
        self._layer = layer
        self._note = note
        self._last = last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        self._note(kwargs)
        if self._last:
            raise Finished(hidden)
        return hidden


def _given(note: dict[str, Any], positions: int) -> Given:
    angles, mask = note.get("position_embeddings"), note.get("attention_mask")
    if not isinstance(angles, tuple) or len(angles) != 2 or not isinstance(mask, Pattern | None):
        raise MisfitError("their code hands other things to its layers than angles and a mask")
    cosines, sines = (part[0] for part in angles)
    if cosines.ndim != 2 or cosines.shape[0] != positions or cosines.shape != sines.shape:
        raise MisfitError(f"their code hands angles of shape {list(cosines.shape)} to its layers")
    return Given(cosines, sines, mask)
