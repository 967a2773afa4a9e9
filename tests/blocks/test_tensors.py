"""Rows as they travel, as torch has them and as numpy does: three views of the same numbers."""

import math

import numpy as np
import pytest
import torch

from llmasos.blocks.devices import DTYPES
from llmasos.blocks.tensors import from_floats, from_torch, is_finite, to_floats, to_torch, wire_dtype
from llmasos.config import DType

HIDDEN = 7
DTYPE_NAMES: tuple[DType, ...] = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_numpy_and_torch_see_the_same_rows(dtype: DType) -> None:
    rows = torch.randn(5, HIDDEN).to(DTYPES[dtype])
    parts = [from_torch(rows[:2]), from_torch(rows[2:])]
    floats = to_floats(parts)
    assert np.array_equal(floats, rows.float().numpy())
    floats[0, 0] = 1.0  # memory of their own
    assert to_torch(parts[0])[0, 0] == rows[0, 0]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_numpy_rounds_as_torch_does(dtype: DType) -> None:
    # halves between two neighbours, too: their last bit decides
    rows = torch.cat([torch.randn(50, HIDDEN), 1 + torch.arange(7)[None] / 2**8, 1 + torch.arange(7)[None] / 2**11])
    assert torch.equal(to_torch(from_floats(rows.numpy(), dtype)), rows.to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found(dtype: DType, value: float) -> None:
    rows = torch.full((3, HIDDEN), torch.finfo(DTYPES[dtype]).max, dtype=DTYPES[dtype])
    assert is_finite(from_torch(rows))
    rows[2, 6] = value
    assert not is_finite(from_torch(rows))


def test_only_some_numbers_travel() -> None:
    with pytest.raises(ValueError, match="float64 activations do not travel"):
        wire_dtype("float64")
