"""Rows in fewer bytes, for slow links: what a codec does to numbers, and nothing about when.

    bfloat16   the upper half of each float32, rounded to the nearest
    int8       blocks of `INT8_BLOCK` numbers: their largest magnitude / 127 as a float32, and each as a multiple of it

A row's bytes depend on nothing but the row: not on those that are packed with it, nor on the machine (each step is one
rounding of IEEE 754). So a row that is packed again, or sent in another company, arrives as the same numbers, and a
replay is exact. In a packed tensor each row is whole - its scales, then its numbers - so that rows can be cut and
joined without unpacking.

What is not finite stays so: a block with a NaN or an infinity becomes NaN, which the next hop refuses.
"""

import numpy as np
from numpy.typing import NDArray

from llmasos.config import INT8_BLOCK, Codec, DType
from llmasos.wire import ITEM_BYTES, Tensor, row_bytes

CODECS: tuple[Codec, ...] = ("exact", "bfloat16", "int8")
"""What we can read and write."""

_LARGEST = np.float32(127)
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / _LARGEST, np.float32(0))
"""127 times as much is finite."""


def pack(rows: Tensor, codec: Codec) -> Tensor:
    """Exact rows as that codec sends them; as they are, where it would save nothing."""
    if codec == "exact" or row_bytes(rows.hidden, rows.dtype, codec) >= row_bytes(rows.hidden, rows.dtype):
        return rows
    numbers = _floats(rows)
    packed = to_bfloat16(numbers) if codec == "bfloat16" else _to_int8(numbers)
    return Tensor(rows.dtype, rows.shape, packed.reshape(-1).data, codec)


def unpack(rows: Tensor) -> Tensor:
    """The exact rows that a packed tensor stands for."""
    if rows.codec == "exact":
        return rows
    packed = np.frombuffer(rows.data, np.uint8).reshape(rows.tokens, row_bytes(rows.hidden, rows.dtype, rows.codec))
    numbers = from_bfloat16(packed) if rows.codec == "bfloat16" else _from_int8(packed, rows.hidden)
    return _tensor(numbers, rows.dtype)


def to_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rounded to nearest, ties to even. What rounds to no finite number is infinite."""
    bits = numbers.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    halves = rounded.astype("<u4", copy=False).view("<u2")[:, 1::2].copy()
    nan = np.isnan(numbers)
    if nan.any():  # rounding may have carried them into the sign
        halves[nan] = 0x7FC0
    return halves.view(np.uint8)


def from_bfloat16(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What `to_bfloat16` gave, in float32."""
    halves: NDArray[np.uint16] = packed.view("<u2")
    numbers = np.zeros(halves.shape, "<f4")
    numbers.view("<u2")[:, 1::2] = halves
    return numbers


def _to_int8(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(tokens, hidden) -> (tokens, 4 · blocks + hidden)"""
    tokens, hidden = numbers.shape
    blocks = _blocks(hidden)
    padded = numbers
    if hidden % INT8_BLOCK:
        padded = np.zeros((tokens, blocks * INT8_BLOCK), np.float32)
        padded[:, :hidden] = numbers
    cut = padded.reshape(tokens, blocks, INT8_BLOCK)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = np.abs(cut).max(axis=2) / _LARGEST  # (tokens, blocks)
        scales[~np.isfinite(scales)] = np.nan
        scales = np.minimum(scales, _LARGEST_SCALE)
        # A scale of zero is of zeros, or of numbers so small that they become zero. One that is hardly above it is
        # rounded so much that a number may be more than 127 of it.
        multiples = cut / np.where(scales == 0, np.float32(1), scales)[:, :, None]
        np.clip(np.rint(multiples, out=multiples), -_LARGEST, _LARGEST, out=multiples)
        multiples[np.isnan(scales)] = 0  # what stands there is lost: the scale says so
    packed = np.empty((tokens, 4 * blocks + hidden), np.uint8)
    packed[:, : 4 * blocks] = scales.astype("<f4").view(np.uint8)
    packed[:, 4 * blocks :].view(np.int8)[...] = multiples.reshape(padded.shape)[:, :hidden]
    return packed


def _from_int8(packed: NDArray[np.uint8], hidden: int) -> NDArray[np.float32]:
    blocks = _blocks(hidden)
    scales: NDArray[np.float32] = np.ascontiguousarray(packed[:, : 4 * blocks]).view("<f4")  # (tokens, blocks)
    multiples: NDArray[np.int8] = packed[:, 4 * blocks :].view(np.int8)
    with np.errstate(invalid="ignore", over="ignore"):  # a stranger's scales may be anything
        if hidden % INT8_BLOCK == 0:
            return (multiples.reshape(len(multiples), blocks, INT8_BLOCK) * scales[:, :, None]).reshape(multiples.shape)
        return multiples * np.repeat(scales, INT8_BLOCK, axis=1)[:, :hidden]


def _blocks(hidden: int) -> int:
    return -(-hidden // INT8_BLOCK)


def _floats(rows: Tensor) -> NDArray[np.float32]:
    """(tokens, hidden)"""
    match rows.dtype:
        case "float32":
            return np.frombuffer(rows.data, np.float32).reshape(rows.shape)
        case "bfloat16":
            return from_bfloat16(np.frombuffer(rows.data, np.uint8).reshape(rows.tokens, 2 * rows.hidden))
        case "float16":
            return np.frombuffer(rows.data, np.float16).reshape(rows.shape).astype(np.float32)


def _tensor(numbers: NDArray[np.float32], dtype: DType) -> Tensor:
    shape = (numbers.shape[0], numbers.shape[1])
    match dtype:
        case "float32":
            data = np.ascontiguousarray(numbers).view(np.uint8)
        case "bfloat16":
            data = to_bfloat16(numbers)
        case "float16":
            with np.errstate(over="ignore"):
                data = numbers.astype("<f2").view(np.uint8)
    assert data.size == shape[0] * shape[1] * ITEM_BYTES[dtype], "every number is there"
    return Tensor(dtype, shape, data.reshape(-1).data)
