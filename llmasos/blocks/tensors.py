"""Wire tensors <-> torch tensors."""

from typing import cast, get_args

import torch

from llmasos.blocks.devices import DTYPES
from llmasos.config import DType
from llmasos.wire import Tensor


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
