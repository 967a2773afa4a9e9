"""Linear layers whose weight is kept in the order that it is computed in: oneDNN's, or the compiled library's.

`nn.Linear` reorders its weight on every call. Doing that once makes one row twice as fast and 1 to 16 rows cost the
same (docs/log.md). It also makes the result of a row independent of how many rows share the call, from two rows up;
one row alone is therefore computed as two.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmasos.blocks.native.head import NativeLinear
from llmasos.blocks.native.library import available
from llmasos.blocks.native.stack import KINDS

ROWS_HINT = 16
"""Row count that the weight order is tuned for: batches of decoding sessions."""


# By the names of their overloads: to find one by its arguments takes torch as long as a small product.
_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if torch._C._has_mkldnn else None
_pointwise_with: Any = torch.ops.mkldnn._linear_pointwise.binary if torch._C._has_mkldnn else None


def can_pack(layer: nn.Module, device: str) -> bool:
    """Whether `layer` is a plain linear layer that oneDNN can take over on this machine."""
    if type(layer) not in (nn.Linear, Conv1D) or torch.device(device).type != "cpu" or not torch._C._has_mkldnn:
        return False
    weight = cast(torch.Tensor, layer.weight)
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class PackedLinear(nn.Module):
    """Takes over the weight of an `nn.Linear`, or of GPT-2's `Conv1D`, which is one with its weight transposed.

    The original is dropped by the caller.
    """

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        self._transposed = isinstance(linear, Conv1D)
        weight = (linear.weight.detach().t() if self._transposed else linear.weight.detach()).contiguous()
        self.out_features, self.in_features = (int(size) for size in weight.shape)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.nbytes = weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its usual order, rebuilt at each call: right for any family that reads it, but slow."""
        weight = cast(torch.Tensor, self.packed.to_dense())
        return weight.t() if self._transposed else weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features)."""
        if rows.numel() == self.in_features:  # one row: see the module's docstring
            pair = rows.reshape(1, -1).expand(2, -1).contiguous()
            return self.activated(pair, "none")[:1].reshape(*rows.shape[:-1], -1)
        return self.activated(rows, "none")

    def activated(self, rows: torch.Tensor, activation: str, approximation: str = "") -> torch.Tensor:
        """The same for two rows or more, through an activation by oneDNN's name."""
        return cast(torch.Tensor, _pointwise(rows, self.packed, self.bias, activation, [], approximation))

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The same for two rows or more, `other` (…, out_features) added."""
        return cast(torch.Tensor, _pointwise_with(rows, other, self.packed, self.bias, "add"))

    def times(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The same for two rows or more, multiplied by `other` (…, out_features)."""
        return cast(torch.Tensor, _pointwise_with(rows, other, self.packed, self.bias, "mul"))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedPart(nn.Module):
    """In the place of a linear layer that was joined with others: some outputs of the whole, which computes all."""

    def __init__(self, whole: PackedLinear, first: int, last: int) -> None:
        super().__init__()
        self.whole = whole
        self.in_features, self.out_features = whole.in_features, last - first
        self._outputs = slice(first, last)

    @property
    def weight(self) -> torch.Tensor:
        """As that of a `PackedLinear`."""
        return self.whole.weight[self._outputs]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self._outputs]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features)."""
        return cast(torch.Tensor, self.whole(rows)[..., self._outputs])


def join_linears(module: nn.Module, names: Sequence[str]) -> PackedLinear:
    """Make one of the linear layers `names` of `module`, which read the same rows and can be packed."""
    linears = [cast(nn.Linear, module.get_submodule(name)) for name in names]
    biases = [_zeros_or(linear.bias, linear) for linear in linears]
    some = any(linear.bias is not None for linear in linears)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    whole = PackedLinear(_linear(weight, torch.cat(biases) if some else None))
    ends = accumulate((linear.out_features for linear in linears), initial=0)
    for name, (first, last) in zip(names, pairwise(ends), strict=True):
        setattr(module, name, PackedPart(whole, first, last))
    return whole


def separate_linears(module: nn.Module, names: Sequence[str]) -> None:
    """Undo `join_linears`: each is packed for itself then."""
    for name in names:
        part = cast(PackedPart, module.get_submodule(name))
        setattr(module, name, PackedLinear(_linear(part.weight, part.bias)))


def _zeros_or(bias: torch.Tensor | None, linear: nn.Linear) -> torch.Tensor:
    return linear.weight.new_zeros(linear.out_features) if bias is None else bias.detach()


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def pack_linears(module: nn.Module, device: str) -> None:
    """Replace every plain linear layer inside `module`, one at a time, so that no two copies of all exist at once."""
    for name, child in list(module.named_children()):
        if isinstance(child, PackedPart):
            continue
        if can_pack(child, device):
            setattr(module, name, PackedLinear(cast(nn.Linear, child)))
        else:
            pack_linears(child, device)


def pack_head(model: Any, kind: str, device: str) -> None:
    """Give a model's head to the compiled library, its weight kept as `kind`, where there is one that takes it."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and torch.device(device).type == "cpu" and kind in KINDS and available():
        model.set_output_embeddings(NativeLinear(head, kind))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all weights and buffers of `module`, prepacked ones included; shared tensors count once."""
    tensors = {id(t): t.nbytes for t in [*module.parameters(), *module.buffers()] if not t.is_meta}
    return sum(tensors.values()) + sum(m.nbytes for m in module.modules() if isinstance(m, PackedLinear | NativeLinear))
