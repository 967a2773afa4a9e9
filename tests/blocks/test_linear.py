"""Prepacked linear layers: the same numbers, and the same bits in any company."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmasos.blocks.linear import PackedLinear, can_pack, join_linears, pack_linears, separate_linears, weight_bytes

SHAPES = [(96, 40), (44, 132), (7, 5), (576, 1536)]
ROWS = [1, 2, 3, 5, 16, 17, 64, 129, 512]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@torch.inference_mode()
def test_rows_have_the_same_bits_whoever_shares_the_call(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(inputs, outputs, dtype=dtype)
    if not can_pack(linear, "cpu"):
        pytest.skip(f"oneDNN does not take {dtype} here")
    packed, rows = PackedLinear(linear), torch.randn(512, inputs).to(dtype)
    together = packed(rows)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together, linear(rows), rtol=tolerance, atol=tolerance)
    for count in ROWS:
        assert torch.equal(packed(rows[:count]), together[:count]), f"{count} rows"
        assert torch.equal(packed(rows[-count:]), together[-count:]), f"the last {count} rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_what_rides_in_a_product_is_what_would_follow_it(dtype: torch.dtype) -> None:
    linear = nn.Linear(44, 132, dtype=dtype)
    if not can_pack(linear, "cpu"):
        pytest.skip(f"oneDNN does not take {dtype} here")
    packed, rows, other = PackedLinear(linear), torch.randn(129, 44).to(dtype), torch.randn(129, 132).to(dtype)
    plain = linear(rows)
    gelu = nn.functional.gelu(plain, approximate="tanh")
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for run, expected in [
        (lambda part: packed.activated(rows[part], "swish"), nn.functional.silu(plain)),
        (lambda part: packed.activated(rows[part], "gelu", "tanh"), gelu),
        (lambda part: packed.plus(rows[part], other[part]), plain + other),
        (lambda part: packed.times(rows[part], other[part]), plain * other),
    ]:
        together = run(slice(None))
        torch.testing.assert_close(together, expected, rtol=tolerance, atol=tolerance)
        for count in ROWS[1:]:
            assert torch.equal(run(slice(count)), together[:count]), f"{count} rows"


@torch.inference_mode()
def test_any_leading_shape_is_kept() -> None:
    linear = nn.Linear(13, 9, bias=False)
    packed = PackedLinear(linear)
    for shape in [(13,), (1, 13), (1, 1, 13), (2, 3, 13), (1, 6, 13)]:
        rows = torch.randn(shape)
        assert packed(rows).shape == linear(rows).shape
        torch.testing.assert_close(packed(rows), linear(rows))


@torch.inference_mode()
def test_the_transposed_layers_of_gpt2_are_taken_over_too() -> None:
    layer, rows = Conv1D(9, 13), torch.randn(4, 13)
    nn.init.normal_(layer.bias)
    packed = PackedLinear(layer)
    torch.testing.assert_close(packed(rows), layer(rows))
    assert torch.equal(packed.weight, layer.weight)


@torch.inference_mode()
def test_code_that_reads_the_weight_gets_it() -> None:
    linear = nn.Linear(13, 9)
    assert torch.equal(PackedLinear(linear).weight, linear.weight)


@pytest.mark.parametrize("biases", [(False, False, False), (True, False, True)])
@torch.inference_mode()
def test_layers_that_are_joined_compute_what_each_did(biases: tuple[bool, bool, bool]) -> None:
    sizes = {"q": 12, "k": 6, "v": 7}
    named = {name: nn.Linear(13, size, bias=bias) for (name, size), bias in zip(sizes.items(), biases, strict=True)}
    module, rows = nn.ModuleDict(named), torch.randn(5, 13)
    before, expected = weight_bytes(module), {name: linear(rows) for name, linear in named.items()}
    weights = {name: linear.weight.clone() for name, linear in named.items()}

    def check() -> None:
        for name, part in module.items():
            torch.testing.assert_close(part(rows), expected[name])
            assert torch.equal(part.weight, weights[name])

    whole = join_linears(module, list(sizes))
    torch.testing.assert_close(whole(rows), torch.cat(list(expected.values()), dim=1))
    check()
    zeros = sum(4 * size for size, bias in zip(sizes.values(), biases, strict=True) if any(biases) and not bias)
    assert weight_bytes(module) == before + zeros
    separate_linears(module, list(sizes))
    check()
    assert all(type(part) is PackedLinear for part in module.children())


@torch.inference_mode()
def test_packing_keeps_one_copy_of_each_weight() -> None:
    class Special(nn.Linear):
        """A family's own kind of linear layer stays what it is."""

    model = nn.Sequential(nn.Linear(13, 9), nn.Sequential(nn.Linear(9, 7, bias=False)), Special(7, 3), nn.LayerNorm(3))
    before = weight_bytes(model)
    pack_linears(model, "cpu")
    assert [type(module) for module in model] == [PackedLinear, nn.Sequential, Special, nn.LayerNorm]
    assert weight_bytes(model) == before == 4 * (13 * 9 + 9 + 9 * 7 + 7 * 3 + 3 + 3 + 3)
    assert sum(p.numel() for p in model.parameters()) == 7 * 3 + 3 + 3 + 3


def test_other_devices_and_types_keep_their_linear_layers() -> None:
    assert not can_pack(nn.Linear(3, 5), "cuda")
    assert not can_pack(nn.Linear(3, 5, dtype=torch.float16), "cpu")
    assert not can_pack(nn.LayerNorm(3), "cpu")
