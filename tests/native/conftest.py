"""Random stacks, and what torch makes of the same weights."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from llmasos.blocks import native
from llmasos.blocks.native.stack import UNLIMITED, Array, Geometry, Layer, Matrix, Norm, Stack, interleave

POSITIONS = 400


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not native.available():
        pytest.skip(native.why_not())


SMALL = Geometry(hidden=50, heads=6, kv_heads=2, head_dim=10, intermediate=37)


@dataclass(frozen=True)
class Recipe:
    """A stack of random layers, all options chosen."""

    geometry: Geometry = SMALL
    layers: int = 2
    activation: str = "silu"
    biases: bool = False
    head_norms: bool = False
    post_norms: bool = False
    rotary_width: int = 10  # 0: positions do not count
    window: int = UNLIMITED
    softcap: float = 0.0
    seed: int = 0

    def weights(self) -> list[dict[str, Array]]:
        """Of each layer, by name."""
        g = self.geometry
        random = np.random.default_rng(self.seed)
        shapes: dict[str, tuple[int, ...]] = {
            "q": (g.heads * g.head_dim, g.hidden),
            "k": (g.kv_heads * g.head_dim, g.hidden),
            "v": (g.kv_heads * g.head_dim, g.hidden),
            "o": (g.hidden, g.heads * g.head_dim),
            "gate": (g.intermediate, g.hidden),
            "up": (g.intermediate, g.hidden),
            "down": (g.hidden, g.intermediate),
        }
        layers = []
        for _ in range(self.layers):
            made = {name: _random(random, shape, shape[1] ** -0.5) for name, shape in shapes.items()}
            if self.biases:
                made |= {f"{name}_bias": _random(random, shape[:1], 0.3) for name, shape in shapes.items()}
            norms = ["pre_attention", "pre_mlp", *(("post_attention", "post_mlp") if self.post_norms else ())]
            made |= {name: 1 + _random(random, (g.hidden,), 0.1) for name in norms}
            if self.head_norms:
                made |= {name: 1 + _random(random, (g.head_dim,), 0.1) for name in ("query_norm", "key_norm")}
            layers.append(made)
        return layers

    def angles(self) -> tuple[Array, Array]:
        half = self.rotary_width // 2
        steps = np.arange(POSITIONS)[:, None] * 0.7 ** np.arange(half)[None, :]
        both = np.concatenate([steps, steps], axis=1)
        return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)

    def stack(self, kind: str = "float32", threads: int = 1, variant: str | None = None) -> Stack:
        """The layers, packed."""
        stack = Stack(self.geometry, threads, variant)
        if self.rotary_width:
            stack.set_rotary(0, *self.angles())
        for made in self.weights():
            biases = {name: made.get(f"{name}_bias") for name in ("q", "k", "v", "o", "gate", "up", "down")}
            together = [made["q"], made["k"], made["v"]]
            qkv_bias = np.concatenate([biases["q"], biases["k"], biases["v"]]) if self.biases else None
            gate_up_bias = interleave(biases["gate"], biases["up"]) if self.biases else None
            norms = {name: Norm(made[name], 1e-5) for name in made if name.endswith(("_attention", "_mlp", "_norm"))}
            stack.add(
                Layer(
                    qkv=Matrix(kind, np.concatenate(together), qkv_bias),
                    out=Matrix(kind, made["o"], biases["o"]),
                    gate_up=Matrix(kind, interleave(made["gate"], made["up"]), gate_up_bias),
                    down=Matrix(kind, made["down"], biases["down"]),
                    activation=self.activation,
                    scale=0.4,
                    rotary=0 if self.rotary_width else None,
                    window=self.window,
                    softcap=self.softcap,
                    **norms,
                )
            )
        return stack

    def reference(self, rows: Array) -> Array:
        """A whole sequence from position 0 on, by torch in float64."""
        x = torch.from_numpy(rows).double()
        for made in self.weights():
            x = self._layer({name: torch.from_numpy(weight).double() for name, weight in made.items()}, x)
        return x.float().numpy()

    def _layer(self, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        g = self.geometry
        tokens = len(x)

        def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(rows, w[name], w.get(f"{name}_bias"))

        def norm(name: str, rows: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(rows, rows.shape[-1:], w[name], 1e-5) if name in w else rows

        def rotate(heads: torch.Tensor) -> torch.Tensor:  # (tokens, heads, head_dim)
            width = self.rotary_width
            cos, sin = (torch.from_numpy(a[:tokens]).double()[:, None] for a in self.angles())
            front, back = heads[..., :width], heads[..., width:]
            turned = torch.cat([-front[..., width // 2 :], front[..., : width // 2]], dim=-1)
            return torch.cat([front * cos + turned * sin, back], dim=-1)

        h = norm("pre_attention", x)
        q = norm("query_norm", linear("q", h).view(tokens, g.heads, g.head_dim))
        k = norm("key_norm", linear("k", h).view(tokens, g.kv_heads, g.head_dim))
        v = linear("v", h).view(tokens, g.kv_heads, g.head_dim).repeat_interleave(g.heads // g.kv_heads, 1)
        if self.rotary_width:
            q, k = rotate(q), rotate(k)
        k = k.repeat_interleave(g.heads // g.kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.4
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        back = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        scores = scores.masked_fill((back < 0) | (back >= self.window), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(tokens, -1)
        x = x + norm("post_attention", linear("o", attended))
        h = norm("pre_mlp", x)
        gate = linear("gate", h)
        functional = torch.nn.functional
        active = functional.silu(gate) if self.activation == "silu" else functional.gelu(gate, approximate="tanh")
        return x + norm("post_mlp", linear("down", active * linear("up", h)))

    def but(self, **changes: object) -> "Recipe":
        return replace(self, **changes)  # type: ignore[arg-type]


def _random(random: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    return (random.standard_normal(shape) * scale).astype(np.float32)


def rows_of(count: int, hidden: int, seed: int = 0) -> Array:
    return np.random.default_rng(1_000 + seed).standard_normal((count, hidden)).astype(np.float32)


def whole(stack: Stack, rows: Array) -> Array:
    """All rows of one session in one chunk."""
    out = rows.copy()
    stack.forward(0, stack.layers, [(stack.new_cache(), 0, len(rows))], out)
    return out
