"""Wire tensors <-> torch tensors."""

import torch

from llmasos.config import DType
from llmasos.wire import Tensor

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def wire_dtype(name: str) -> DType:
    """The same name, known to be one that travels. Raises ValueError."""
    if name == "float32" or name == "bfloat16" or name == "float16":
        return name
    raise ValueError(f"{name} activations do not travel")


def to_torch(tensor: Tensor) -> torch.Tensor:
    """The rows of a wire tensor, (tokens, hidden), in memory of their own."""
    if tensor.tokens == 0:
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    # The copy frees the frame, aligns the rows, and gives torch memory that it may write to.
    return torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def from_torch(rows: torch.Tensor) -> Tensor:
    """Rows of (tokens, hidden) as bytes for the wire."""
    rows = rows.detach().cpu().contiguous()
    data = memoryview(rows.view(torch.uint8).numpy()).cast("B") if rows.numel() else memoryview(b"")
    return Tensor(wire_dtype(str(rows.dtype).removeprefix("torch.")), (rows.shape[0], rows.shape[1]), data)
