"""The compiled library, found and checked. Who has none, or an outdated one, is told so and computes with torch."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmasos.blocks.native import compile as build

LIBRARY_VARIABLE = "LLMASOS_NATIVE_LIBRARY"
"""Environment: another library than the installed one, as the tests' with sanitizers."""
VARIANT_VARIABLE = "LLMASOS_NATIVE_VARIANT"
"""Environment: avx512, avx2 or portable, instead of the fastest that runs here."""

POINTER = ctypes.c_void_p
INT = ctypes.c_int
LONG = ctypes.c_int64


class GeometryStruct(ctypes.Structure):
    """`Geometry` in src/stack.h."""

    _fields_ = (("hidden", INT), ("heads", INT), ("kv_heads", INT), ("head_dim", INT))


class NormStruct(ctypes.Structure):
    """`Norm` in src/stack.h."""

    _fields_ = (("weight", POINTER), ("eps", ctypes.c_float))


class LayerStruct(ctypes.Structure):
    """`LayerSpec` in src/stack.h."""

    _fields_ = (
        ("pre_attention", NormStruct),
        ("post_attention", NormStruct),
        ("pre_mlp", NormStruct),
        ("post_mlp", NormStruct),
        ("query_norm", NormStruct),
        ("key_norm", NormStruct),
        ("qkv", POINTER),
        ("out", POINTER),
        ("gate_up", POINTER),
        ("down", POINTER),
        ("activation", INT),
        ("rotary", INT),
        ("rotary_width", INT),
        ("window", LONG),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class ChunkStruct(ctypes.Structure):
    """`Chunk` in src/stack.h."""

    _fields_ = (("cache", POINTER), ("position", LONG), ("rows", LONG))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "digest": (ctypes.c_char_p, []),
    "variant": (ctypes.c_char_p, [INT]),
    "prepare": (None, []),
    "matrix_new": (POINTER, [INT, INT, INT, POINTER, POINTER]),
    "matrix_unpack": (None, [POINTER, POINTER]),
    "matrix_bytes": (LONG, [POINTER]),
    "matrix_free": (None, [POINTER]),
    "stack_new": (POINTER, [ctypes.POINTER(GeometryStruct), INT, INT]),
    "stack_free": (None, [POINTER]),
    "stack_add": (INT, [POINTER, ctypes.POINTER(LayerStruct)]),
    "stack_rotary": (INT, [POINTER, INT, POINTER, POINTER, LONG, INT]),
    "stack_bytes": (LONG, [POINTER]),
    "stack_forward": (INT, [POINTER, INT, INT, ctypes.POINTER(ChunkStruct), INT, POINTER]),
    "head_new": (POINTER, [POINTER, INT, INT]),
    "head_free": (None, [POINTER]),
    "head_bytes": (LONG, [POINTER]),
    "head_forward": (INT, [POINTER, POINTER, LONG, POINTER]),
    "cache_new": (POINTER, [POINTER]),
    "cache_free": (None, [POINTER]),
    "cache_fork": (POINTER, [POINTER, LONG]),
    "cache_truncate": (INT, [POINTER, LONG]),
    "cache_bytes": (LONG, [POINTER]),
}


@dataclass(frozen=True)
class Library:
    """The functions of the library by their short names, and the variants of the kernels that run on this machine."""

    call: dict[str, Any]
    variants: dict[str, int]

    def variant(self, name: str | None = None) -> int:
        """The index of a variant, else of the one in the environment, else of the fastest. Raises LookupError."""
        wanted = name or os.environ.get(VARIANT_VARIABLE)
        if not wanted:
            return min(self.variants.values())
        if wanted not in self.variants:
            raise LookupError(f"this machine runs the kernels {', '.join(self.variants)}, not {wanted}")
        return self.variants[wanted]


@cache
def _open(path: Path) -> Library | str:
    """The library, or why there is none."""
    if not path.exists():
        return "no compiled kernels are installed (a C++ compiler and `make install` give them)"
    try:
        loaded = ctypes.CDLL(str(path))
        call = {name: getattr(loaded, f"llmasos_{name}") for name in _FUNCTIONS}
    except (OSError, AttributeError) as error:
        return f"the compiled kernels cannot be loaded ({error})"
    for name, (result, arguments) in _FUNCTIONS.items():
        call[name].restype, call[name].argtypes = result, arguments
    if build.SOURCES.is_dir() and call["digest"]().decode() != build.digest():
        return "the compiled kernels are not of these sources (`make install` compiles them anew)"
    names = [(index, call["variant"](index)) for index in range(3)]
    return Library(call, {name.decode(): index for index, name in names if name})


def _found() -> Library | str:
    return _open(Path(os.environ.get(LIBRARY_VARIABLE) or build.LIBRARY))


def library() -> Library:
    """Raises LookupError where there is none."""
    found = _found()
    if isinstance(found, str):
        raise LookupError(found)
    return found


def available() -> bool:
    """Whether blocks can be run by the compiled kernels here."""
    return not isinstance(_found(), str)


def why_not() -> str:
    """Why not; empty where they are available."""
    found = _found()
    return found if isinstance(found, str) else ""


def variants() -> list[str]:
    """Of the kernels that run on this machine, the fastest first."""
    return list(library().variants)
