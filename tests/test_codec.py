"""Rows in fewer bytes: how far they come back from what they were, and what their bytes do not depend on."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmasos.codec import pack, unpack
from llmasos.config import INT8_BLOCK
from llmasos.wire import Tensor, row_bytes

LOSSY = ("bfloat16", "int8")
WIDTHS = st.sampled_from([2, 7, 63, 64, 65, 130, 192])
TINIEST, LARGEST = np.float32(1e-45), np.finfo(np.float32).max


def tensor(numbers: NDArray[np.float32]) -> Tensor:
    return Tensor("float32", numbers.shape, memoryview(numbers.astype(np.float32).tobytes()))


def floats(rows: Tensor) -> NDArray[np.float32]:
    assert (rows.dtype, rows.codec) == ("float32", "exact")
    return np.frombuffer(rows.data, np.float32).reshape(rows.shape)


def bits(rows: Tensor) -> bytes:
    return bytes(rows.data)


@st.composite
def activations(draw: st.DrawFn) -> NDArray[np.float32]:
    """(tokens, hidden): normal numbers, each row of another magnitude, with zeros, outliers and extremes among them."""
    tokens, hidden = draw(st.integers(1, 5)), draw(WIDTHS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scales = np.array([10.0 ** draw(st.integers(-44, 37)) for _ in range(tokens)])[:, None]
    numbers = (rng.standard_normal((tokens, hidden)) * scales).astype(np.float32)
    special = st.sampled_from([0.0, -0.0, TINIEST, -TINIEST, LARGEST, -LARGEST, 1e-40, 300.0])
    for _ in range(draw(st.integers(0, 3))):
        numbers[draw(st.integers(0, tokens - 1)), draw(st.integers(0, hidden - 1))] = draw(special)
    if draw(st.booleans()):
        numbers[draw(st.integers(0, tokens - 1))] = 0
    return numbers


@given(activations())
@example(np.full((1, 64), LARGEST, np.float32))
@example(np.full((2, 65), TINIEST, np.float32))
def test_int8_is_off_by_half_a_step_of_its_block(numbers: NDArray[np.float32]) -> None:
    back = floats(unpack(pack(tensor(numbers), "int8"))).astype(np.float64)
    assert np.isfinite(back).all()
    if row_bytes(numbers.shape[1], "float32", "int8") >= 4 * numbers.shape[1]:
        assert (back == numbers).all()
        return
    for start in range(0, numbers.shape[1], INT8_BLOCK):
        block, returned = (part[:, start : start + INT8_BLOCK].astype(np.float64) for part in (numbers, back))
        step = np.abs(block).max(axis=1, keepdims=True) / 127
        assert (np.abs(returned - block) <= step * 0.50001 + 127 * TINIEST).all()


@given(activations())
def test_bfloat16_rounds_as_torch_does(numbers: NDArray[np.float32]) -> None:
    back = floats(unpack(pack(tensor(numbers), "bfloat16")))
    expected = torch.from_numpy(numbers.copy()).bfloat16().float().numpy()
    assert np.array_equal(back, expected)


@pytest.mark.parametrize("codec", LOSSY)
@given(numbers=activations(), data=st.data())
def test_a_row_is_packed_alike_in_any_company(codec: str, numbers: NDArray[np.float32], data: st.DataObject) -> None:
    together = pack(tensor(numbers), codec)
    start = data.draw(st.integers(0, len(numbers) - 1))
    end = data.draw(st.integers(start + 1, len(numbers)))
    apart = pack(tensor(numbers[start:end]), codec)
    assert bits(apart) == bits(together.rows(start, end))
    assert bits(unpack(apart)) == bits(unpack(together).rows(start, end))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("hidden", [64, 70, 130])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_come_back_finite(codec: str, hidden: int, bad: float) -> None:
    numbers = np.ones((3, hidden), np.float32)
    numbers[1, hidden - 1] = bad
    back = floats(unpack(pack(tensor(numbers), codec)))
    assert not np.isfinite(back[1, hidden - 1])
    assert np.isfinite(back[[0, 2]]).all()


def test_an_outlier_spoils_its_own_block_only() -> None:
    numbers = np.full((1, 128), 0.01, np.float32)
    numbers[0, 3] = 1_000.0
    back = floats(unpack(pack(tensor(numbers), "int8")))
    assert back[0, 4] == 0
    assert np.allclose(back[0, 64:], 0.01, rtol=1e-6)


@pytest.mark.parametrize("codec", LOSSY)
def test_no_rows_are_no_bytes(codec: str) -> None:
    packed = pack(Tensor("float32", (0, 70), memoryview(b"")), codec)
    assert packed.data.nbytes == 0
    assert unpack(packed).shape == (0, 70)


def test_what_would_save_nothing_is_left_as_it_is() -> None:
    exact = tensor(np.ones((2, 64), np.float32))
    assert pack(exact, "exact") is exact
    assert unpack(exact) is exact
    half = Tensor("bfloat16", (2, 64), memoryview(bytes(256)))
    assert pack(half, "bfloat16") is half


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_numbers_come_back_as_they_went(dtype: str) -> None:
    """Blocks that compute in two bytes take two bytes, whatever the rows travelled as."""
    numbers = torch.linspace(-3, 3, 2 * 70).to(getattr(torch, dtype)).view(2, 70)
    rows = Tensor(dtype, (2, 70), memoryview(numbers.view(torch.uint8).numpy().tobytes()))
    packed = pack(rows, "int8")
    assert packed.data.nbytes == 2 * (70 + 8)
    back = torch.frombuffer(bytearray(unpack(packed).data), dtype=getattr(torch, dtype)).view(2, 70)
    assert (back - numbers).abs().max() < 3 / 127
