"""The two ends of a model, which the client runs: tokens to hidden states before block 0, and hidden states after
the last block to logits.

Both are the model class itself with no layer in its list. What the class does to embeddings before its first layer
(positions, scales, norms, projections) and to hidden states behind its last one (norm, projection, head, soft-cap,
scales) is thereby its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmasos.blocks.anatomy import MISFITS, Anatomy, dissect
from llmasos.blocks.attention import NotPackableError, PackedCache, PackedStep, SessionView
from llmasos.blocks.chain import Chain, Finished
from llmasos.blocks.devices import DTYPES, resolve_device, resolve_dtype
from llmasos.blocks.kv_cache import SessionCache
from llmasos.blocks.linear import pack_head, pack_linears, weight_bytes
from llmasos.blocks.loading import Loader, Progress, left_on_meta
from llmasos.blocks.quiet import quiet
from llmasos.blocks.registry import ModelSpec
from llmasos.errors import UnsupportedModelError, UsageError
from llmasos.span import Span


class ModelEnds:
    """Embedding and head of a model. Not reentrant: one thread calls it."""

    def __init__(self, spec: ModelSpec, dtype: str, device: str, body: Anatomy, chain: Chain) -> None:
        self.hidden_size = spec.hidden_size
        self.vocab_size = spec.vocab_size
        self.dtype = dtype
        self.device = device
        self.torch_dtype = DTYPES[dtype]
        self.weight_bytes = weight_bytes(body.model)
        self._family = spec.family
        self._body = body
        self._model = body.model
        self._chain = chain
        self._table: torch.Tensor | None = None  # (vocab, hidden), where the class does nothing but look tokens up

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], position: int) -> torch.Tensor:
        """What enters block 0 for these tokens at `[position, position + tokens)`: (tokens, hidden)."""
        if not token_ids:
            return torch.empty(0, self.hidden_size, dtype=self.torch_dtype, device=self.device)
        outside = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise UsageError(f"token {outside[0]} is not in the vocabulary of {self.vocab_size}")
        ids = torch.tensor([list(token_ids)], dtype=torch.long, device=self.device)
        if self._table is not None:
            return self._table[ids[0]]
        self._chain.capture_first = True
        try:
            self._forward(position, len(token_ids), input_ids=ids)
        except Finished as finished:
            # A copy: what the layers would get may be a view of what the class keeps.
            return finished.hidden[0].clone()
        finally:
            self._chain.capture_first = False
        raise UnsupportedModelError(f"{self._family} models run their layers in an unusual order")

    @torch.inference_mode()
    def look_up_if_that_is_all(self) -> None:
        """From now on look tokens up in the model's table of embeddings, if its class does nothing else with them.

        A class that scales them, or adds something for their positions, is found out by some tokens at some positions.
        """
        try:
            embedding = self._model.get_input_embeddings()
        except NotImplementedError:  # the class does not say where it is
            return
        if type(embedding) is not nn.Embedding:
            return
        table = embedding.weight.detach()
        ids = [0, 1, self.vocab_size // 2, self.vocab_size - 1]
        rows = table[torch.tensor(ids, device=self.device)]
        embedded = [self.embed(ids, position) for position in (0, 1, 64)]
        if all(given.dtype == rows.dtype and torch.equal(given, rows) for given in embedded):
            self._table = table

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of the next token for each row: (rows, hidden) -> (rows, vocab), float32, on the CPU or device."""
        if hidden.dim() != 2 or hidden.shape[1] != self.hidden_size:
            raise UsageError(f"rows of shape {list(hidden.shape)} are not (rows, {self.hidden_size})")
        rows = hidden.shape[0]
        if rows == 0:
            return torch.empty(0, self.vocab_size, device=self.device)
        given = hidden.to(self.device, self.torch_dtype)[None]
        self._chain.feed(given, None)
        # The token 0 in every place is never looked at: the hidden states come in behind it.
        ids = torch.zeros(1, rows, dtype=torch.long, device=self.device)
        try:
            out = self._forward(0, rows, input_ids=ids)
        finally:
            self._chain.feed(None, None)
        return out.logits[0].float()  # type: ignore[no-any-return]

    def _forward(self, position: int, tokens: int, **inputs: Any) -> Any:
        if self._body.takes_positions:
            inputs["position_ids"] = torch.arange(position, position + tokens, device=self.device)[None]
        cache = SessionView(SessionCache(Span(0, self._body.blocks)), position)
        with PackedCache(PackedStep([])):
            return self._model(**inputs, past_key_values=cache, use_cache=True)


def load_ends(
    spec: ModelSpec,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: str = "none",
    progress: Progress | None = None,
) -> ModelEnds:
    """Load everything of a model but its blocks.

    With blocks of fewer bits, whichever, a head that the compiled library runs is kept in int8: it is a good part of
    what a token reads, and four bits would cost too much of the text where nothing comes behind to mend it.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    body = dissect(spec.config, dtype)
    loader = Loader(body.model, spec.source.checkpoint(), DTYPES[dtype], device)
    names = loader.others(body.prefix)
    chain = Chain(body.layers, None)
    setattr(body.owner, body.list_name, chain)
    total = loader.nbytes(names)
    missing = loader.load(names, "its ends")
    body.model.tie_weights(missing_keys=missing, recompute_mapping=False)
    loader.refuse_missing(missing)
    loader.settle(body.model)
    lost = left_on_meta(body.model)
    if lost:
        raise UnsupportedModelError(f"{spec.family} models keep {lost[0]} where it is not loaded from")
    pack_head(body.model, dtype if quantization == "none" else "int8", device)
    pack_linears(body.model, device)
    if progress is not None:
        progress(total, total)
    ends = ModelEnds(spec, dtype, device, body, chain)
    _try_out(ends, body)
    ends.look_up_if_that_is_all()
    return ends


def _try_out(ends: ModelEnds, body: Anatomy) -> None:
    """Run both ends once, so that a family which does not fit is refused now."""
    try:
        try:
            rows = ends.embed([0, 1, 0], 2)
        except NotPackableError:  # it makes a mask of its own: let it, no attention is computed here
            with quiet():
                body.model.set_attn_implementation(body.attention)
            rows = ends.embed([0, 1, 0], 2)
        scores = ends.logits(rows)
    except MISFITS as reason:
        raise UnsupportedModelError(
            f"{body.model.config.model_type} models cannot be served block by block: their code fails without blocks "
            f"({reason})"
        ) from reason
    if rows.shape != (3, ends.hidden_size) or scores.shape[0] != 3:
        raise UnsupportedModelError(
            f"{body.model.config.model_type} models cannot be served block by block: what enters their blocks has the "
            f"shape {list(rows.shape)}, not (tokens, {ends.hidden_size})"
        )
