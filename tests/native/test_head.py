"""A linear layer by itself: what it gives is what its weight says, for any number of rows, in any company."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmasos.blocks import native
from llmasos.blocks.ends import load_ends
from llmasos.blocks.linear import PackedLinear
from llmasos.blocks.native.head import Head, NativeLinear
from llmasos.blocks.native.stack import KINDS, Matrix
from llmasos.blocks.registry import resolve
from tests.native.conftest import rows_of

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_rows_times_the_matrix_as_it_unpacks(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    variant = data.draw(st.sampled_from(native.variants()))
    inputs, outputs, rows = (data.draw(st.integers(1, most)) for most in (150, 140, 30))
    weight, bias = rows_of(outputs, inputs), rows_of(1, outputs, seed=4)[0] if data.draw(st.booleans()) else None
    matrix = Matrix(kind, weight, bias)
    kept = matrix.unpack().astype(np.float64)
    head = Head(matrix, data.draw(st.integers(1, 3)), variant)
    x = rows_of(rows, inputs, seed=9)
    out = head.forward(x)
    expected = x @ kept.T + (0 if bias is None else bias)
    assert np.linalg.norm(out - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-6
    # The same bits alone.
    row = data.draw(st.integers(0, rows - 1))
    assert np.array_equal(head.forward(x[row : row + 1])[0], out[row])


def test_no_rows_and_wrong_rows() -> None:
    head = Head(Matrix("float32", rows_of(5, 7)))
    assert head.forward(np.empty((0, 7), np.float32)).shape == (0, 5)
    for wrong in (rows_of(2, 8), rows_of(1, 7)[0]):
        with pytest.raises(ValueError, match="rows"):
            head.forward(wrong)
    assert np.array_equal(head.forward(rows_of(6, 7)[::2]), head.forward(rows_of(6, 7))[::2])


def test_it_stands_in_for_a_linear_layer() -> None:
    layer = nn.Linear(33, 70, dtype=torch.bfloat16)
    rows = torch.from_numpy(rows_of(6, 33)).reshape(2, 3, 33).bfloat16()
    out = NativeLinear(layer, "bfloat16")(rows)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, layer.float()(rows.float()), rtol=1e-4, atol=1e-5)


def test_the_head_of_a_model_is_kept_in_fewer_bits_with_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resolve("smollm2")
    rows = torch.from_numpy(rows_of(2, spec.hidden_size))
    exact, small = load_ends(spec), load_ends(spec, quantization="int4")
    weight = spec.hidden_size * spec.vocab_size
    assert exact.weight_bytes - small.weight_bytes == pytest.approx(3 * weight, rel=0.01)
    expected, rounded = exact.logits(rows), small.logits(rows)
    assert not torch.equal(expected, rounded)
    assert float((rounded - expected).norm() / expected.norm()) < 0.02

    def heads(ends: Any) -> type[nn.Module]:
        return type(ends._model.get_output_embeddings())

    assert heads(exact) is heads(small) is NativeLinear
    monkeypatch.setattr("llmasos.blocks.linear.available", lambda: False)
    on_torch = load_ends(spec)
    assert heads(on_torch) is PackedLinear
    torch.testing.assert_close(on_torch.logits(rows), expected, rtol=1e-4, atol=1e-3)
