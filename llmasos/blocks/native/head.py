"""A linear layer by itself in the compiled library: a model's head, which is read from end to end for each token."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmasos.blocks.native.library import library
from llmasos.blocks.native.stack import Matrix, given, succeed

Array = NDArray[np.float32]


class Head:
    """Rows times a matrix, on `threads` threads. Not reentrant. Computes without holding the interpreter.

    A row's result is bit for bit the same whoever shares the call.
    """

    def __init__(self, matrix: Matrix, threads: int = 1, variant: str | None = None) -> None:
        self.outputs, self.inputs = matrix.shape
        self._call = library().call
        self.handle = given(self._call["head_new"](matrix.handle, threads, library().variant(variant)))
        matrix.release()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return int(self._call["head_bytes"](self.handle))

    def forward(self, rows: Array) -> Array:
        """(rows, inputs) -> (rows, outputs). Raises NativeMemoryError."""
        rows = np.ascontiguousarray(rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.inputs:
            raise ValueError(f"rows {rows.shape} for a head of {self.inputs}")
        out = np.empty((len(rows), self.outputs), np.float32)
        succeed(self._call["head_forward"](self.handle, rows.ctypes.data, len(rows), out.ctypes.data))
        return out

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self._call["head_free"](self.handle)


class NativeLinear(nn.Module):
    """Does the work of an `nn.Linear`, whose weight it keeps as `kind`. Gives float32, whatever it is given."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        bias = None if linear.bias is None else linear.bias.detach().float().numpy()
        matrix = Matrix(kind, linear.weight.detach().float().numpy(), bias)
        self.head = Head(matrix, torch.get_num_threads())
        self.nbytes = self.head.nbytes

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features)."""
        flat = rows.detach().reshape(-1, self.in_features).float().numpy()
        return torch.from_numpy(self.head.forward(flat)).reshape(*rows.shape[:-1], self.out_features)
