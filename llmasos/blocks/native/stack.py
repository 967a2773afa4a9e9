"""Blocks in the compiled library, as Python sees them: matrices, a stack of layers, caches. numpy, no torch.

Handles own what they point to, and free it when they go. Shapes are checked here; the library believes them.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmasos.blocks.native.library import (
    ChunkStruct,
    GeometryStruct,
    LayerStruct,
    NormStruct,
    library,
)

Array = NDArray[np.float32]

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
"""What weights may be stored as; rows and kv are float32 throughout."""
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
PAGE_TOKENS = 64
"""Positions of a kv page: PAGE_TOKENS in src/kernels.h."""
UNLIMITED = 2**62
"""The window of attention that sees everything."""
_LANES = 16


class NativeMemoryError(RuntimeError):
    """The library got no memory, or no thread."""

    def __init__(self) -> None:
        super().__init__("there is no memory left")


@dataclass(frozen=True, slots=True)
class Geometry:
    """What all layers of a stack have in common."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: `x / rms(x) * weight`, an offset of the weight included in it."""

    weight: Array
    eps: float


class Matrix:
    """A linear layer, packed. `weight` is (outputs, inputs)."""

    def __init__(self, kind: str, weight: Array, bias: Array | None = None) -> None:
        weight = np.ascontiguousarray(weight, np.float32)
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))
        if min(self.shape) < 1 or (bias is not None and bias.shape != self.shape[:1]):
            raise ValueError(f"a matrix of {weight.shape} with a bias of {None if bias is None else bias.shape}")
        bias = None if bias is None else np.ascontiguousarray(bias, np.float32)
        self._call = library().call
        made = self._call["matrix_new"](KINDS[kind], *self.shape, _address(weight), _address(bias))
        self.handle = given(made)

    @property
    def nbytes(self) -> int:
        return int(self._call["matrix_bytes"](self.handle))

    def unpack(self) -> Array:
        """The weight as the kernels use it: what came in, after rounding."""
        out = np.empty(self.shape, np.float32)
        self._call["matrix_unpack"](self.handle, _address(out))
        return out

    def release(self) -> int:
        """Give the handle away."""
        handle, self.handle = self.handle, 0
        return handle

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self._call["matrix_free"](self.handle)


@dataclass(slots=True)
class Layer:
    """One block. The matrices are given away when it is added to a stack."""

    qkv: Matrix  # queries, keys, values one above the other
    out: Matrix
    gate_up: Matrix  # as `interleave` has them
    down: Matrix
    activation: str
    scale: float
    pre_attention: Norm | None = None
    post_attention: Norm | None = None
    pre_mlp: Norm | None = None
    post_mlp: Norm | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rotary: int | None = None
    """Which rotary table; None where positions do not count."""
    window: int = UNLIMITED
    softcap: float = 0.0


def interleave(gate: Array, up: Array) -> Array:
    """Sixteen rows of `gate`, sixteen of `up`, and so on; both padded with zero rows."""
    rows = -(-gate.shape[0] // _LANES) * _LANES
    padded = np.zeros((2, rows, *gate.shape[1:]), np.float32)
    padded[0, : gate.shape[0]], padded[1, : up.shape[0]] = gate, up
    parts = padded.reshape(2, rows // _LANES, _LANES, *gate.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(2 * rows, *gate.shape[1:])


def separate(gate_up: Array, rows: int) -> tuple[Array, Array]:
    """What `interleave` was given."""
    parts = gate_up.reshape(-1, 2, _LANES, *gate_up.shape[1:])
    gate, up = (parts[:, index].reshape(-1, *gate_up.shape[1:])[:rows] for index in (0, 1))
    return gate, up


class Cache:
    """Keys and values of one session in all layers of a stack."""

    def __init__(self, stack: "Stack", handle: int | None = None) -> None:
        self.stack = stack  # lives as long as its caches
        self._call = stack.call
        self.handle = given(self._call["cache_new"](stack.handle)) if handle is None else handle

    @property
    def nbytes(self) -> int:
        return int(self._call["cache_bytes"](self.handle))

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` positions."""
        succeed(self._call["cache_truncate"](self.handle, tokens))

    def fork(self, tokens: int) -> "Cache":
        """A cache with the first `tokens` positions, which must be whole pages that are there. Shares their memory."""
        if tokens % PAGE_TOKENS:
            raise ValueError(f"{tokens} positions are not whole pages of {PAGE_TOKENS}")
        return Cache(self.stack, given(self._call["cache_fork"](self.handle, tokens)))

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self._call["cache_free"](self.handle)


class Stack:
    """Layers, and forward passes through some of them. Not reentrant. Computes without holding the interpreter."""

    def __init__(self, geometry: Geometry, threads: int = 1, variant: str | None = None) -> None:
        g = geometry
        if min(g.hidden, g.heads, g.kv_heads, g.head_dim, g.intermediate, threads) < 1 or g.heads % g.kv_heads:
            raise ValueError(f"{g} with {threads} threads makes no sense")
        self.geometry = geometry
        self.layers = 0
        self.call = library().call
        struct = GeometryStruct(g.hidden, g.heads, g.kv_heads, g.head_dim)
        index = library().variant(variant)
        self.variant = next(name for name, other in library().variants.items() if other == index)
        self.handle = given(self.call["stack_new"](ctypes.byref(struct), threads, index))
        self._tables: dict[int, tuple[Array, Array]] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices."""
        return int(self.call["stack_bytes"](self.handle))

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one layer. Head widths are padded to 16 in the values."""
        g = self.geometry
        return 4 * g.kv_heads * (g.head_dim + -(-g.head_dim // _LANES) * _LANES)

    def new_cache(self) -> Cache:
        """An empty cache for one session, for the layers that are there now."""
        return Cache(self)

    def add(self, layer: Layer) -> None:
        """Put a layer on top. Its rotary table must be there."""
        self._check(layer)
        norms = {name: _norm(getattr(layer, name)) for name, _ in LayerStruct._fields_[:6]}
        width = 0 if layer.rotary is None else self._tables[layer.rotary][0].shape[1]
        matrices = [layer.qkv, layer.out, layer.gate_up, layer.down]
        struct = LayerStruct(
            **norms,
            **dict(zip(("qkv", "out", "gate_up", "down"), (m.handle for m in matrices), strict=True)),
            activation=ACTIVATIONS[layer.activation],
            rotary=-1 if layer.rotary is None else layer.rotary,
            rotary_width=width,
            window=layer.window,
            scale=layer.scale,
            softcap=layer.softcap,
        )
        succeed(self.call["stack_add"](self.handle, ctypes.byref(struct)))
        for matrix in matrices:
            matrix.release()
        self.layers += 1

    def _check(self, layer: Layer) -> None:
        g = self.geometry
        rows = (g.heads + 2 * g.kv_heads) * g.head_dim
        padded = -(-g.intermediate // _LANES) * _LANES * 2
        expected = {
            "qkv": (rows, g.hidden),
            "out": (g.hidden, g.heads * g.head_dim),
            "gate_up": (padded, g.hidden),
            "down": (g.hidden, g.intermediate),
        }
        for name, shape in expected.items():
            if getattr(layer, name).shape != shape:
                raise ValueError(f"{name} is {getattr(layer, name).shape}, not {shape}")
        for name, _ in LayerStruct._fields_[:6]:
            norm, width = getattr(layer, name), g.head_dim if name in ("query_norm", "key_norm") else g.hidden
            if norm is not None and norm.weight.shape != (width,):
                raise ValueError(f"{name} is {norm.weight.shape}, not ({width},)")
        if layer.window < 1 or (layer.rotary is not None and layer.rotary not in self._tables):
            raise ValueError(f"a window of {layer.window}, rotary table {layer.rotary}")

    def prepare(self) -> None:
        """Have the system find some of the memory that caches take next, as long as nobody waits for a pass."""
        self.call["prepare"]()

    def set_rotary(self, table: int, cosines: Array, sines: Array) -> None:
        """Angles of the positions from 0 on, (positions, width) each; replaces a table of the same width."""
        cosines, sines = (np.ascontiguousarray(angles, np.float32) for angles in (cosines, sines))
        width = cosines.shape[1]
        if cosines.shape != sines.shape or width % 2 or not 0 < width <= self.geometry.head_dim:
            raise ValueError(f"angles of {cosines.shape} and {sines.shape} for heads of {self.geometry.head_dim}")
        if table in self._tables and self._tables[table][0].shape[1] != width:
            raise ValueError(f"rotary table {table} changes its width")
        call = self.call["stack_rotary"]
        succeed(call(self.handle, table, _address(cosines), _address(sines), cosines.shape[0], width))
        self._tables[table] = (cosines, sines)  # the library borrows them

    @property
    def positions(self) -> int:
        """How many positions all rotary tables cover."""
        return min((len(cosines) for cosines, _ in self._tables.values()), default=UNLIMITED)

    def forward(self, first: int, last: int, chunks: Sequence[tuple[Cache, int, int]], rows: Array) -> None:
        """Run rows (tokens, hidden) in place through the layers `[first, last)`.

        A chunk is (cache, position, rows): that many rows, from that position on. Raises NativeMemoryError, and the
        positions in the caches are what they were.
        """
        count = sum(chunk[2] for chunk in chunks)
        if rows.dtype != np.float32 or not rows.flags.c_contiguous or rows.shape != (count, self.geometry.hidden):
            raise ValueError(f"{rows.dtype} rows {rows.shape} for {count} rows of {self.geometry.hidden}")
        if not 0 <= first <= last <= self.layers or any(position < 0 for _, position, _ in chunks):
            raise ValueError(f"layers {first}:{last} of {self.layers}")
        if any(position + tokens > self.positions for _, position, tokens in chunks):
            raise ValueError(f"the rotary tables end at {self.positions}")
        structs = (ChunkStruct * len(chunks))(*(ChunkStruct(cache.handle, at, tokens) for cache, at, tokens in chunks))
        succeed(self.call["stack_forward"](self.handle, first, last, structs, len(chunks), _address(rows)))

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self.call["stack_free"](self.handle)


def _address(array: Array | None) -> int | None:
    return None if array is None else int(array.ctypes.data)


def _norm(norm: Norm | None) -> NormStruct:
    return NormStruct(None, 0.0) if norm is None else NormStruct(_address(norm.weight), norm.eps)


def given(handle: Any) -> int:
    """The handle. Raises NativeMemoryError where there is none."""
    if not handle:
        raise NativeMemoryError
    return int(handle)


def succeed(done: int) -> None:
    """Raises NativeMemoryError where a call says that it has not."""
    if not done:
        raise NativeMemoryError
