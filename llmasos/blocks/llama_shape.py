"""What a transformers layer computes, as far as a Llama-shaped block of our own can do the same.

Three kinds of looking, and each must agree: the family is one whose code was read for this; the modules of the layer
are those of a Llama-shaped block; and what the modules do is tried out - which activation, which norm, which positions
its attention sees, which angles its heads are rotated by. What does not fit raises `MisfitError`, which says why.
Whether all of it together is right is for `loading` to compare.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llmasos.blocks.attention import Pattern
from llmasos.blocks.native.stack import ACTIVATIONS, UNLIMITED, Geometry, Norm

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"})
"""Read against native/src/stack.cpp and fused.py. Others may look the same and differ where no short trial gets to, as
in clamping large values or in scaling attention behind thousands of positions."""

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_NORMS = {
    # names in the layer: (pre_attention, post_attention, pre_mlp, post_mlp)
    frozenset({"input_layernorm", "post_attention_layernorm"}): (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ),
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    ): ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_FAR = 4096
"""Up to here a mask is looked at position by position; the end of a wider window is searched for."""


class MisfitError(Exception):
    """Why these blocks are none that we have code of our own for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer without its weights."""

    geometry: Geometry
    activation: str
    scale: float
    softcap: float
    rotates: bool
    norms: tuple[str | None, str | None, str | None, str | None]
    head_norms: bool


def shape_of(layer: nn.Module, family: str) -> Shape:
    """Read off the modules of a layer, which need no weights for it. Raises MisfitError."""
    if family not in FAMILIES:
        raise MisfitError(f"{family} blocks have not been written for them")
    children = {name for name, _ in layer.named_children()}
    norms = _NORMS.get(frozenset(children - {"self_attn", "mlp"}))
    if norms is None or not {"self_attn", "mlp"} <= children:
        raise MisfitError(f"{family} blocks are made of {', '.join(sorted(children))}")
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    _expect(attention, _ATTENTION, _HEAD_NORMS, family)
    _expect(mlp, _MLP, {"act_fn"}, family)
    head_dim = int(getattr(attention, "head_dim", 0))
    q, k, v, o = (_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    gate, up, down = (_linear(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
    if head_dim < 1 or q.out_features % head_dim or k.out_features % head_dim:
        raise MisfitError(f"{family} blocks have heads of {head_dim} in projections of {q.out_features}")
    geometry = Geometry(
        q.in_features, q.out_features // head_dim, k.out_features // head_dim, head_dim, gate.out_features
    )
    fits = (
        geometry.heads % geometry.kv_heads == 0
        and v.out_features == k.out_features
        and (o.in_features, o.out_features) == (q.out_features, q.in_features)
        and (up.in_features, up.out_features) == (gate.in_features, gate.out_features)
        and (down.in_features, down.out_features) == (gate.out_features, gate.in_features)
    )
    if not fits:
        raise MisfitError(f"{family} blocks have projections that do not fit together")
    return Shape(
        geometry,
        _activation(mlp, family),
        float(getattr(attention, "scaling", head_dim**-0.5)),
        float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        bool(getattr(attention, "use_rope", True)),
        norms,
        any(True for name, _ in attention.named_children() if name in _HEAD_NORMS),
    )


def _expect(module: nn.Module, needed: set[str], optional: set[str], family: str) -> None:
    children = {name for name, _ in module.named_children()}
    odd = sorted((needed - children) | (children - needed - optional))
    if odd or (children & _HEAD_NORMS and not children >= _HEAD_NORMS):
        raise MisfitError(f"the {type(module).__name__} of {family} blocks differs in {', '.join(odd) or 'its norms'}")


def _linear(module: nn.Module, name: str) -> nn.Linear:
    found = module.get_submodule(name)
    if type(found) is not nn.Linear:
        raise MisfitError(f"{name} is a {type(found).__name__}")
    return found


def _activation(mlp: nn.Module, family: str) -> str:
    """By what it does to some numbers."""
    known: dict[str, Any] = {
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    assert set(known) == set(ACTIVATIONS)
    points = torch.linspace(-6.0, 6.0, 25)
    act: Any = mlp.act_fn
    for name, function in known.items():
        if torch.allclose(act(points), function(points), rtol=1e-5, atol=1e-6):
            return name
    raise MisfitError(f"the activation of {family} blocks is neither {' nor '.join(known)}")


def norm_of(module: nn.Module, width: int) -> Norm:
    """An RMSNorm with its weights loaded, tried out. Raises MisfitError."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None or tuple(weight.shape) != (width,):
        raise MisfitError(f"{type(module).__name__} is no RMSNorm over {width} numbers")
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 1e-2  # small, so that eps counts
    given = module(rows)
    normed = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    weight = weight.detach().float()
    for factor in (weight, 1.0 + weight):
        if torch.allclose(given, normed * factor, rtol=1e-4, atol=1e-6):
            return Norm(np.ascontiguousarray(factor.numpy(), np.float32), float(eps))
    raise MisfitError(f"{type(module).__name__} computes something else than an RMSNorm")


def window_of(mask: Pattern | None) -> int:
    """How many positions a query sees, itself included. Raises MisfitError for any other pattern."""
    if mask is None or mask.causal:
        return UNLIMITED
    zero = torch.zeros((), dtype=torch.long)
    keys = torch.arange(_FAR)
    queries = torch.tensor([0, 1, 2, 3, 63, 64, 65, 500, 511, 512, 1000, _FAR - 1])
    seen = mask.visible(zero, zero, queries[:, None], keys[None, :]).expand(len(queries), -1)
    window = int(seen[-1].sum())
    expected = (keys <= queries[:, None]) & (keys > queries[:, None] - window)
    if not torch.equal(seen, expected):
        raise MisfitError("their attention sees something else than the last positions")
    if window < _FAR:
        return window
    return _wide_window(mask, zero)


def _wide_window(mask: Pattern, zero: torch.Tensor) -> int:
    """By halving: the longest way back that is seen."""
    query = 2**40

    def sees(back: int) -> bool:
        return bool(mask.visible(zero, zero, torch.tensor(query), torch.tensor(query - back)))

    near, far = _FAR - 1, 2**39
    if sees(far):
        return UNLIMITED
    while far - near > 1:
        middle = (near + far) // 2
        near, far = (middle, far) if sees(middle) else (near, middle)
    return near + 1
