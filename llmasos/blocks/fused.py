"""Llama-shaped blocks on torch in a third of the operations that their family's own code takes.

Between two products a small model's block does little, but torch's way to each operation is long, and behind a product
that has read megabytes it is cold: of a pass of one row, a third went there (docs/log.md). So residuals, activation and
gate ride in oneDNN's products, heads are rotated without being cut apart, and norms are a few operations on whole rows.
What is attended to remains with `attention`; what the model class does before its first layer is done once, in
`angles`, and not for each token in each peer. Whether a layer is of this shape is for `llama_shape` to say, and whether
all of it together computes what the family does for `trial`.

Every operation gives a row the same bits whoever shares it, from two rows up.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from llmasos.blocks.angles import Angles
from llmasos.blocks.attention import PackedCache, Pattern, packed_attention
from llmasos.blocks.linear import PackedLinear, can_pack, join_linears, pack_linears, separate_linears
from llmasos.blocks.llama_shape import MisfitError, Shape, norm_of, shape_of
from llmasos.span import Span

log = logging.getLogger(__name__)

_POST_OPS = {"silu": ("swish", ""), "gelu_tanh": ("gelu", "tanh")}
"""What oneDNN calls the activations: its word for one and for how it is approximated."""
_JOINED = ("q_proj", "k_proj", "v_proj")
"""What reads the same rows, and becomes one product."""

Angle = tuple[torch.Tensor, torch.Tensor]
"""Cosines, and sines with the sign that the halves of a head take when they change places: (positions, 1, width)."""


class Fusion:
    """Makes blocks of our own of layers as they are loaded: of all of them, or of none."""

    def __init__(self, family: str, device: str) -> None:
        self._family = family
        self._device = device
        self._blocks: dict[int, FusedBlock] = {}
        self._fits = True

    @torch.no_grad()
    def take(self, layer: nn.Module, index: int) -> bool:
        """Prepack a layer that was just loaded, for a block of our own. False if it or one before it is of another
        shape, or its weights cannot be: this one has not changed then.
        """
        if self._fits:
            try:
                self._blocks[index] = FusedBlock(layer, shape_of(layer, self._family), index, self._device)
            except MisfitError as reason:
                self._give_up(f"block {index}: {reason}")
        return self._fits

    def finish(self, ask: Callable[[Iterable[int]], Angles]) -> "FusedBlocks | None":
        """With what `ask` says of the blocks that rotate, once all layers were taken. None if they are as they were."""
        if self._fits:
            try:
                return FusedBlocks(self._blocks, ask([index for index, block in self._blocks.items() if block.rotates]))
            except MisfitError as reason:
                self._give_up(str(reason))
        return None

    def _give_up(self, reason: str) -> None:
        log.debug("%s runs as transformers has it: %s", self._family, reason)
        self._fits = False
        for block in self._blocks.values():
            block.dissolve()


class FusedBlock:
    """Takes the place of a decoder layer in packed passes, with the weights of that layer."""

    def __init__(self, layer: nn.Module, shape: Shape, index: int, device: str) -> None:
        """Raises MisfitError for a layer whose products cannot be prepacked, or whose norms are something else."""
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        g = shape.geometry
        self._attention: Any = attention
        self._index = index
        self._head_dim = g.head_dim
        self._heads = [g.heads, g.kv_heads, g.kv_heads]
        self._scale = shape.scale
        self._softcap = shape.softcap or None
        self.rotates = shape.rotates
        self._activation = _POST_OPS[shape.activation]
        before, behind, between, last = shape.norms
        self._before_attention = _RMSNorm.of(layer, before, g.hidden)
        self._behind_attention = _RMSNorm.of(layer, behind, g.hidden)
        self._before_mlp = _RMSNorm.of(layer, between, g.hidden)
        self._behind_mlp = _RMSNorm.of(layer, last, g.hidden)
        self._query_norm = _RMSNorm.of(attention, "q_norm" if shape.head_norms else None, g.head_dim)
        self._key_norm = _RMSNorm.of(attention, "k_norm" if shape.head_norms else None, g.head_dim)
        if not can_pack(attention.get_submodule("q_proj"), device):
            raise MisfitError(f"its weights cannot be prepacked on {device}")
        self._projection = join_linears(attention, _JOINED)
        pack_linears(layer, device)
        self._out = cast(PackedLinear, attention.get_submodule("o_proj"))
        self._gate, self._up, self._down = (
            cast(PackedLinear, mlp.get_submodule(name)) for name in ("gate_proj", "up_proj", "down_proj")
        )

    def dissolve(self) -> None:
        """Leave the weights to the layer that they came from, in the form that is fastest there."""
        separate_linears(self._attention, _JOINED)

    def __call__(
        self,
        hidden_states: torch.Tensor,  # (1, rows, hidden), two rows or more
        angles: Angle | None,
        pattern: Pattern | None,
        cache: PackedCache,
    ) -> torch.Tensor:
        """The rows behind this block."""
        rows = _normed(self._before_attention, hidden_states)
        heads = self._projection(rows).view(1, rows.shape[1], -1, self._head_dim)
        queries, keys, values = heads.split(self._heads, dim=2)  # (1, rows, heads, head_dim) each
        queries, keys = _normed(self._query_norm, queries), _normed(self._key_norm, keys)
        if angles is not None:
            queries, keys = _rotated(queries, *angles), _rotated(keys, *angles)
        queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        cache.update(keys, values, self._index)
        attended, _ = packed_attention(
            self._attention, queries, keys, values, pattern, self._scale, softcap=self._softcap
        )
        rows = attended.reshape(*hidden_states.shape[:2], -1)
        hidden_states = _added(self._out, self._behind_attention, rows, hidden_states)
        rows = _normed(self._before_mlp, hidden_states)
        rows = self._up.times(rows, self._gate.activated(rows, *self._activation))
        return _added(self._down, self._behind_mlp, rows, hidden_states)


class FusedBlocks:
    """All blocks of a span, called one after another with what their model class would hand to each of them."""

    def __init__(self, blocks: Mapping[int, FusedBlock], angles: Angles) -> None:
        self._blocks = blocks
        self._angles = angles
        self._fold()

    def _fold(self) -> None:
        self._tables = [_folded(*table) for table in self._angles.tables]

    def run(
        self, span: Span, hidden: torch.Tensor, positions: torch.Tensor, length: int, cache: PackedCache
    ) -> torch.Tensor:
        """`hidden` (1, rows, hidden) through the blocks of `span`; `positions` (rows,) are all below `length`."""
        if self._angles.cover(length):
            self._fold()
        angles = [
            (cosines.index_select(0, positions), sines.index_select(0, positions)) for cosines, sines in self._tables
        ]
        for index in span.blocks():
            table = self._angles.table_of.get(index)
            given = None if table is None else angles[table]
            hidden = self._blocks[index](hidden, given, self._angles.patterns[index], cache)
        return hidden

    def dissolve(self) -> None:
        """Leave the weights to the layers that they came from, in the form that is fastest there."""
        for block in self._blocks.values():
            block.dissolve()


class _RMSNorm:
    """`x / rms(x) * weight`, in float32 throughout; an offset of the weight is in `weight` already."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    @staticmethod
    def of(owner: nn.Module, name: str | None, width: int) -> "_RMSNorm | None":
        if name is None:
            return None
        norm = norm_of(owner.get_submodule(name), width)
        return _RMSNorm(torch.from_numpy(norm.weight), norm.eps)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        # The norm of a row is one operation where the mean of its squares is four. What follows on a number a row must
        # not be fused: torch fuses in whole vectors and not behind them, and bits would depend on the number of rows.
        numbers = rows.float()
        scale = torch.linalg.vector_norm(numbers, dim=-1, keepdim=True)
        scale = scale.square_().mul_(1.0 / rows.shape[-1]).add_(self._eps).rsqrt_()
        normed: torch.Tensor = (numbers * scale).mul_(self._weight).to(rows.dtype)
        return normed


def _normed(norm: _RMSNorm | None, rows: torch.Tensor) -> torch.Tensor:
    return rows if norm is None else norm(rows)


def _added(linear: PackedLinear, norm: _RMSNorm | None, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return linear.plus(rows, residual) if norm is None else residual + norm(linear(rows))


def _folded(cosines: torch.Tensor, sines: torch.Tensor) -> Angle:
    half = sines.shape[1] // 2
    return cosines.unsqueeze(1), torch.cat((-sines[:, :half], sines[:, half:]), dim=1).unsqueeze(1)


def _rotated(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (1, rows, heads, head_dim), each half of a head rotated against the other."""
    return (heads * cosines).add_(heads.roll(heads.shape[-1] // 2, -1).mul_(sines))
