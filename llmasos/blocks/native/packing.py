"""A layer of transformers, its weights packed for the compiled kernels."""

from typing import Any

import numpy as np
import torch
from torch import nn

from llmasos.blocks.llama_shape import Shape, norm_of
from llmasos.blocks.native.stack import Array, Layer, Matrix, Norm, interleave, separate


@torch.inference_mode()
def packed(layer: nn.Module, shape: Shape, kind: str, rotary: int | None, window: int) -> Layer:
    """Pack a layer. It keeps, instead of its weights, what they have become. Raises MisfitError."""
    attention: Any = layer.get_submodule("self_attn")
    mlp: Any = layer.get_submodule("mlp")
    g = shape.geometry

    def norm(owner: nn.Module, name: str | None, width: int) -> Norm | None:
        return None if name is None else norm_of(owner.get_submodule(name), width)

    before, behind, between, last = shape.norms
    return Layer(
        qkv=_stacked(kind, attention.q_proj, attention.k_proj, attention.v_proj),
        out=_stacked(kind, attention.o_proj),
        gate_up=_interleaved(kind, mlp.gate_proj, mlp.up_proj),
        down=_stacked(kind, mlp.down_proj),
        activation=shape.activation,
        scale=shape.scale,
        pre_attention=norm(layer, before, g.hidden),
        post_attention=norm(layer, behind, g.hidden),
        pre_mlp=norm(layer, between, g.hidden),
        post_mlp=norm(layer, last, g.hidden),
        query_norm=norm(attention, "q_norm" if shape.head_norms else None, g.head_dim),
        key_norm=norm(attention, "k_norm" if shape.head_norms else None, g.head_dim),
        rotary=rotary,
        window=window,
        softcap=shape.softcap,
    )


def _stacked(kind: str, *parts: nn.Linear) -> Matrix:
    """One above the other."""
    matrix = Matrix(kind, np.concatenate([_weight(part) for part in parts]), _biases(parts))
    if kind != "float32":
        rows = np.cumsum([part.out_features for part in parts])[:-1]
        for part, weight in zip(parts, np.split(matrix.unpack(), rows), strict=True):
            part.weight.copy_(torch.from_numpy(weight))
    return matrix


def _interleaved(kind: str, gate: nn.Linear, up: nn.Linear) -> Matrix:
    bias = None
    if gate.bias is not None or up.bias is not None:
        bias = interleave(_bias(gate), _bias(up))
    matrix = Matrix(kind, interleave(_weight(gate), _weight(up)), bias)
    if kind != "float32":
        for part, weight in zip((gate, up), separate(matrix.unpack(), gate.out_features), strict=True):
            part.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
    return matrix


def _weight(part: nn.Linear) -> Array:
    weight: Array = part.weight.detach().numpy()
    return weight


def _bias(part: nn.Linear) -> Array:
    return np.zeros(part.out_features, np.float32) if part.bias is None else part.bias.detach().numpy()


def _biases(parts: tuple[nn.Linear, ...]) -> Array | None:
    if all(part.bias is None for part in parts):
        return None
    return np.concatenate([_bias(part) for part in parts])
