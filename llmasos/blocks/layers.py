"""A range of a model's decoder blocks, loaded and ready to run for many sessions at once."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmasos.blocks import trial
from llmasos.blocks.anatomy import MISFITS, Anatomy, context_tokens, dissect
from llmasos.blocks.angles import Angles
from llmasos.blocks.attention import NAME as PACKED
from llmasos.blocks.attention import NotPackableError, PackedCache, PackedStep, SessionView, Slot
from llmasos.blocks.chain import Chain, Finished, mute
from llmasos.blocks.devices import DTYPES, resolve_device, resolve_dtype
from llmasos.blocks.fused import FusedBlocks, Fusion
from llmasos.blocks.kv_cache import SessionCache
from llmasos.blocks.linear import pack_linears, weight_bytes
from llmasos.blocks.llama_shape import MisfitError
from llmasos.blocks.loading import Loader, Progress, left_on_meta
from llmasos.blocks.quiet import quiet
from llmasos.blocks.registry import ModelSpec
from llmasos.blocks.tensors import from_torch, to_torch
from llmasos.errors import UnsupportedModelError, UsageError
from llmasos.span import Span
from llmasos.wire import Tensor

log = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "native")
"""What may run blocks: torch runs every family on every device; the compiled kernels are for some, on a CPU."""


@dataclass(slots=True)
class BlockChunk:
    """Rows of one session for one forward pass. `position` must be the length of its cache."""

    cache: SessionCache
    span: Span
    position: int
    hidden: torch.Tensor  # (tokens, hidden)


@dataclass(slots=True)
class WireChunk:
    """The same, with its rows as they travel."""

    cache: SessionCache
    span: Span
    position: int
    hidden: Tensor  # (tokens, hidden)


class DecoderBlocks:
    """The blocks `span` of a model.

    `forward` is not reentrant: one thread calls it. The result for a session does not depend on who shares the call,
    bit for bit, in packed float32 and bfloat16 models on a CPU; experts that are chosen per row are the exception.
    """

    quantization = "none"
    """How weights are rounded beyond `dtype`, in the word that peers announce."""
    runs_on = "torch"
    """What computes, in a word for people."""

    def __init__(self, spec: ModelSpec, span: Span, dtype: str, device: str, body: Anatomy, chain: Chain) -> None:
        self.span = span
        self.hidden_size = spec.hidden_size
        self.dtype = dtype
        self.device = device
        self.packed = body.packed
        self.weight_bytes = weight_bytes(chain)
        self.kv_bytes_per_token = 0
        self.torch_dtype = DTYPES[dtype]
        self.fused: FusedBlocks | None = None
        """What computes packed passes, if not the family's own code."""
        self._family = spec.family
        self._body = body
        self._owner = body.owner
        self._chain = chain
        self._takes_positions = body.takes_positions
        self._context, self._ends_there = context_tokens(spec.config)

    def new_cache(self) -> SessionCache:
        """An empty kv cache for one session on these blocks, or on a part of them."""
        return SessionCache(self.span)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[BlockChunk]) -> list[torch.Tensor]:
        """Run each chunk through its blocks, append to its cache, and return its rows, (tokens, hidden) each.

        Raises UsageError for a chunk that does not fit; no cache has changed then, nor when anything else fails.
        """
        self._check(chunks)
        outputs = [chunk.hidden.new_empty(0, self.hidden_size) for chunk in chunks]
        groups: dict[Span, list[int]] = {}
        for index, chunk in enumerate(chunks):
            if chunk.hidden.shape[0]:
                groups.setdefault(chunk.span, []).append(index)
                chunk.cache.span = chunk.span
        for span, members in groups.items():
            for part in [members] if self.packed else [[member] for member in members]:
                together = [chunks[index] for index in part]
                run = self._run_packed if self.packed else self._run_alone
                for index, rows in zip(part, run(span, together), strict=True):
                    outputs[index] = rows
        for chunk in chunks:
            chunk.cache.length += chunk.hidden.shape[0]
        return outputs

    def forward_wire(self, chunks: Sequence[WireChunk]) -> list[Tensor]:
        """`forward` for rows as they travel, in the numbers that the blocks take."""
        given = [
            BlockChunk(chunk.cache, chunk.span, chunk.position, to_torch(chunk.hidden).to(self.device))
            for chunk in chunks
        ]
        return [from_torch(rows) for rows in self.forward(given)]

    def prepare(self) -> None:
        """Do for passes to come what need not be done within them. Called while nobody waits for one."""

    def _check(self, chunks: Sequence[BlockChunk] | Sequence[WireChunk]) -> None:
        for chunk in chunks:
            self._check_one(chunk)
        if len({id(chunk.cache) for chunk in chunks}) != len(chunks):
            raise UsageError("a session has two chunks in one forward pass")

    def _check_one(self, chunk: BlockChunk | WireChunk) -> None:
        tokens = chunk.hidden.shape[0]
        if len(chunk.hidden.shape) != 2 or chunk.hidden.shape[1] != self.hidden_size:
            raise UsageError(f"rows of shape {list(chunk.hidden.shape)} are not (tokens, {self.hidden_size})")
        if chunk.span not in self.span:
            raise UsageError(f"blocks {chunk.span} are not among the loaded blocks {self.span}")
        if chunk.cache.span not in (None, chunk.span):
            raise UsageError(f"a session on blocks {chunk.cache.span} asks for blocks {chunk.span}")
        if chunk.position != chunk.cache.length:
            raise UsageError(f"a chunk at position {chunk.position} meets a cache of {chunk.cache.length} tokens")
        if self._ends_there and chunk.position + tokens > self._context:
            raise UsageError(
                f"position {chunk.position + tokens} lies behind the {self._context} tokens that this model serves",
                hint="its rotary embedding would change for the tokens that are cached already",
            )

    def _run_packed(self, span: Span, chunks: list[BlockChunk]) -> list[torch.Tensor]:
        """All chunks in one forward pass. A single row is run as two: it has the same bits in any company then."""
        slots = [Slot(chunk.cache, chunk.position, chunk.hidden.shape[0]) for chunk in chunks]
        rows = [chunk.hidden for chunk in chunks]
        positions = [torch.arange(slot.position, slot.position + slot.tokens) for slot in slots]
        counts = [slot.tokens for slot in slots]
        if sum(counts) == 1:
            rows, positions = rows * 2, positions * 2
        hidden = torch.cat(rows).to(self.device, self.torch_dtype)[None]  # (1, rows, hidden)
        where = torch.cat(positions).to(self.device)
        with PackedCache(PackedStep(slots)) as cache:
            if self.fused is not None:
                length = max(slot.position + slot.tokens for slot in slots)
                out = self.fused.run(span, hidden, where, length, cache)[0]
            else:
                out = self._run(span, hidden, where[None], cache)[0]
        # Copies: whoever keeps one session's rows must not keep the whole batch alive.
        return [part.clone() for part in torch.split(out[: sum(counts)], counts)]

    def _run_alone(self, span: Span, chunks: list[BlockChunk]) -> list[torch.Tensor]:
        """One chunk, in the family's own way."""
        (chunk,) = chunks
        hidden = chunk.hidden.to(self.device, self.torch_dtype)[None]  # (1, tokens, hidden)
        positions = torch.arange(chunk.position, chunk.position + hidden.shape[1], device=self.device)[None]
        return [self._run(span, hidden, positions, SessionView(chunk.cache, chunk.position))[0]]

    def _run(
        self, span: Span, hidden: torch.Tensor, positions: torch.Tensor, cache: Any, front: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One forward pass of the model class. `front` is what it takes for embeddings: only its shape matters."""
        self._chain.feed(hidden, span)
        given = {"position_ids": positions} if self._takes_positions else {}
        try:
            self._owner(
                inputs_embeds=hidden if front is None else front, past_key_values=cache, use_cache=True, **given
            )
        except Finished as finished:
            return finished.hidden
        finally:
            self._chain.feed(None, None)
        raise UnsupportedModelError(f"{self._family} models run their layers in an unusual order")

    def run_one_by_one(self) -> None:
        """From now on give each chunk a forward pass of its own, with the family's own attention."""
        self.packed = False
        self._attend_by(self._body.attention)

    def _attend_by(self, implementation: str) -> None:
        with quiet():
            self._body.model.set_attn_implementation(implementation)

    @torch.inference_mode()
    def run_as_family(self, rows: torch.Tensor, cache: Any) -> torch.Tensor:
        """A whole sequence (tokens, hidden) through all loaded blocks with the family's own attention, for trials."""
        self._attend_by("eager" if self._body.packed else self._body.attention)
        try:
            positions = torch.arange(rows.shape[0], device=self.device)[None]
            noise = 10 * torch.randn_like(rows)
            return self._run(self.span, rows[None], positions, cache, noise[None])[0]
        finally:
            self._attend_by(PACKED if self.packed else self._body.attention)


def load_blocks(
    spec: ModelSpec,
    span: Span,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    engine: str = "auto",
    quantize: str = "none",
    progress: Progress | None = None,
) -> DecoderBlocks:
    """Load the blocks `span` of a model, and nothing else of it.

    `engine` auto takes the compiled kernels where they fit and torch elsewhere, and logs why. Raises UsageError for a
    span outside the model, UnsupportedModelError for what cannot be run as asked.
    """
    if span.end > spec.blocks:
        raise UsageError(
            f"blocks {span} reach beyond {spec.name}, which has {spec.blocks}", hint=f"try --blocks 0:{spec.blocks}"
        )
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}", hint=f"try --engine {', '.join(ENGINES)}")
    if quantize != "none" and engine == "torch":
        raise UsageError(f"torch does not run {quantize} blocks", hint="leave --engine at auto")
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    if engine == "native" or quantize != "none" or (engine == "auto" and torch.device(device).type == "cpu"):
        from llmasos.blocks.native.loading import load_natively

        try:
            return load_natively(spec, span, dtype=dtype, device=device, quantize=quantize, progress=progress)
        except MisfitError as reason:
            if engine == "native" or quantize != "none":
                asked = "--engine native" if quantize == "none" else f"--quantize {quantize}"
                raise UnsupportedModelError(
                    f"{spec.name} cannot be served with {asked}: {reason}", hint=f"leave {asked.split()[0]} away"
                ) from reason
            log.info("torch runs the blocks of %s, not the compiled kernels: %s", spec.name, reason)
    return _load_for_torch(spec, span, dtype, device, progress)


def _load_for_torch(spec: ModelSpec, span: Span, dtype: str, device: str, progress: Progress | None) -> DecoderBlocks:
    body = dissect(spec.config, dtype)
    loader = Loader(body.model, spec.source.checkpoint(), DTYPES[dtype], device)
    prefix, layers = body.prefix, body.layers
    plan = {index: loader.tensors(f"{prefix}{index}.") for index in span.blocks()}
    chain = Chain(layers, span)
    setattr(body.owner, body.list_name, chain)
    mute(body.owner, chain)
    total, done = loader.nbytes(name for names in plan.values() for name in names), 0
    fusion = Fusion(spec.family, device) if body.packed and torch.device(device).type == "cpu" else None
    for index, names in plan.items():
        missing = loader.load(names, f"block {index}")
        loader.refuse_missing(name for name in missing if name.startswith(f"{prefix}{index}."))
        if fusion is None or not fusion.take(layers[index], index):
            pack_linears(layers[index], device)
        done += loader.nbytes(names)
        if progress is not None:
            progress(done, total)
    loader.settle(body.owner)
    blocks = DecoderBlocks(spec, span, dtype, device, body, chain)
    if fusion is not None:
        blocks.fused = fusion.finish(lambda rotating: Angles(body, chain, span, rotating, DTYPES[dtype]))
    _try_out(blocks, body)
    return blocks


def _packed_error(blocks: DecoderBlocks) -> float:
    """Of sessions that share a pass. Whether they can is in the family's code, not in a list of names: inf if not."""
    if not blocks.packed:
        return math.inf
    try:
        return trial.deviation(blocks)
    except (NotPackableError, *MISFITS):
        return math.inf


def _try_out(blocks: DecoderBlocks, body: Anatomy) -> None:
    """Refuse blocks that do not compute what their family computes; measure what a cached token costs."""
    lost = left_on_meta(body.owner)
    if lost:
        raise UnsupportedModelError(f"{body.model.config.model_type} models keep {lost[0]} outside of their blocks")
    error = _packed_error(blocks)
    if blocks.fused is not None and not error <= 1:
        log.info("%s runs as transformers has it: blocks of our own give other results", body.model.config.model_type)
        blocks.fused.dissolve()
        blocks.fused = None
        error = _packed_error(blocks)
    family = f"{body.model.config.model_type} models cannot be served block by block"
    if not error <= 1:
        if blocks.packed:
            blocks.run_one_by_one()
        try:
            error = trial.deviation(blocks)
        except MISFITS as reason:
            raise UnsupportedModelError(f"{family}: their code fails when blocks run apart ({reason})") from reason
    if not error <= 1:
        raise UnsupportedModelError(
            f"{family}: their blocks give other results when they run apart ({error:.1f} times the tolerated error)"
        )
    cache = blocks.new_cache()
    blocks.forward([BlockChunk(cache, blocks.span, 0, torch.zeros(1, blocks.hidden_size))])
    blocks.kv_bytes_per_token = cache.bytes_per_token
