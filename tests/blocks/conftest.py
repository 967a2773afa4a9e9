"""One model per family, in memory as transformers loads it and in pieces as LLMasOS does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmasos.blocks.ends import ModelEnds, load_ends
from llmasos.blocks.kv_cache import SessionCache
from llmasos.blocks.layers import BlockChunk, DecoderBlocks, load_blocks
from llmasos.blocks.registry import ModelSpec, resolve
from llmasos.span import Span
from tests.checkpoints import VOCAB, make_checkpoint

SPANS = (Span(0, 2), Span(2, 3), Span(3, 5))
"""Uneven, and each boundary at another kind of layer in the families that mix them."""


@dataclass
class Split:
    """A model in pieces, and what transformers makes of it in one."""

    family: str
    folder: Path
    reference: Any
    spec: ModelSpec
    ends: ModelEnds
    pieces: list[DecoderBlocks]
    loaded: dict[tuple[str, Span], DecoderBlocks] = field(default_factory=dict)

    def load(self, span: Span) -> DecoderBlocks:
        return self.load_as("torch", span)

    def load_as(self, engine: str, span: Span) -> DecoderBlocks:
        if (engine, span) not in self.loaded:
            self.loaded[engine, span] = load_blocks(self.spec, span, engine=engine)
        return self.loaded[engine, span]


class Session:
    """What a client does for one generation, without a network between."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.caches: list[SessionCache] = [piece.new_cache() for piece in split.pieces]

    @property
    def position(self) -> int:
        return self.caches[0].length

    def step(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Run these tokens; the logits behind each."""
        return steps([self], [token_ids])[0]

    def cut(self, length: int) -> None:
        for kv in self.caches:
            kv.truncate(length)


def steps(sessions: Sequence[Session], token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """One step of several sessions of the same model in one batch; the logits of each, (tokens, vocab)."""
    split = sessions[0].split
    rows = [split.ends.embed(ids, s.position) for s, ids in zip(sessions, token_ids, strict=True)]
    for index, piece in enumerate(split.pieces):
        chunks = [
            BlockChunk(session.caches[index], piece.span, session.caches[index].length, hidden)
            for session, hidden in zip(sessions, rows, strict=True)
        ]
        rows = piece.forward(chunks)
    return [split.ends.logits(hidden) for hidden in rows]


def tokens(count: int, seed: int = 1) -> list[int]:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`split_model(family)`: made once and kept."""

    @cache
    def make(family: str) -> Split:
        folder = make_checkpoint(tmp_path_factory.mktemp("model") / family, family)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        spec = resolve(str(folder))
        pieces = [load_blocks(spec, span, engine="torch") for span in SPANS]
        return Split(family, folder, reference, spec, load_ends(spec), pieces)

    return make
