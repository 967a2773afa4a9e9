"""Wire tensors <-> torch tensors and arrays of numpy.

numpy is for what runs once a step between others' work: its calls touch far less memory than torch's, so that they cost
a tenth when the caches are cold (docs/log.md).
"""

from collections.abc import Sequence
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from llmasos.blocks.devices import DTYPES
from llmasos.codec import from_bfloat16, to_bfloat16
from llmasos.config import DType
from llmasos.wire import Tensor

_BFLOAT16_EXPONENT = 0x7F80
"""All ones in infinity and NaN only."""


def wire_dtype(name: str) -> DType:
    """The same name, known to be one that travels. Raises ValueError."""
    if name not in get_args(DType):
        raise ValueError(f"{name} activations do not travel")
    return cast(DType, name)


def to_torch(tensor: Tensor) -> torch.Tensor:
    """The rows of a wire tensor, (tokens, hidden), in memory of their own."""
    if tensor.tokens == 0:
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    # The copy frees the frame, aligns the rows, and gives torch memory that it may write to.
    return torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def from_torch(rows: torch.Tensor) -> Tensor:
    """Rows of (tokens, hidden) as bytes for the wire."""
    rows = rows.detach().cpu().contiguous()
    data = rows.view(torch.uint8).numpy().reshape(-1).data if rows.numel() else memoryview(b"")
    return Tensor(wire_dtype(str(rows.dtype).removeprefix("torch.")), (rows.shape[0], rows.shape[1]), data)


def to_floats(parts: Sequence[Tensor]) -> NDArray[np.float32]:
    """The rows of all parts, one after the other, (tokens, hidden), in memory of their own. They must be alike."""
    hidden = parts[0].hidden
    together = bytearray().join(part.data for part in parts)
    match parts[0].dtype:
        case "float32":
            return np.frombuffer(together, np.float32).reshape(-1, hidden)
        case "bfloat16":
            return from_bfloat16(np.frombuffer(together, np.uint8).reshape(-1, 2 * hidden))
        case "float16":
            return np.frombuffer(together, np.float16).astype(np.float32).reshape(-1, hidden)


def from_floats(rows: NDArray[np.float32], dtype: DType) -> Tensor:
    """Rows of (tokens, hidden) as bytes for the wire, rounded to nearest, ties to even. float32 is not copied."""
    match dtype:
        case "float32":
            numbers = rows.reshape(-1).view(np.uint8)
        case "bfloat16":
            numbers = to_bfloat16(rows).reshape(-1)
        case "float16":
            numbers = rows.reshape(-1).astype(np.float16).view(np.uint8)
    return Tensor(dtype, (rows.shape[0], rows.shape[1]), numbers.data)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    match tensor.dtype:
        case "bfloat16":
            bits = np.frombuffer(tensor.data, np.uint16)
            return not ((bits & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
        case "float32" | "float16":
            return bool(np.isfinite(np.frombuffer(tensor.data, tensor.dtype)).all())
