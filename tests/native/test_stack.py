"""The compiled kernels against the same arithmetic written in torch, in float64."""

import gc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.blocks import native
from llmasos.blocks.native.stack import KINDS, Geometry, Matrix, Stack, interleave, separate
from tests.native.conftest import POSITIONS, Recipe, rows_of, whole

VARIANTS = ["avx512", "avx2", "portable"]
RECIPES = {
    "plain": Recipe(),
    "biases": Recipe(biases=True),
    "head norms": Recipe(head_norms=True),
    "post norms, gelu, softcap": Recipe(post_norms=True, activation="gelu_tanh", softcap=1.5),
    "window": Recipe(window=9),
    "window over pages": Recipe(window=70),
    "no rotation": Recipe(rotary_width=0),
    "rotation of a part": Recipe(rotary_width=6),
    "one kv head, many queries": Recipe(Geometry(34, 15, 1, 16, 18), rotary_width=16),
    "wide heads": Recipe(Geometry(96, 2, 2, 80, 33), rotary_width=80),
    "one of everything": Recipe(Geometry(1, 1, 1, 2, 1), rotary_width=2),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    if request.param not in native.variants():
        pytest.skip(f"this machine does not run {request.param}")
    return str(request.param)


def close(given: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    error = float(np.linalg.norm(given - expected)) / max(float(np.linalg.norm(expected)), 1e-12)
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_is_what_torch_computes(name: str, variant: str) -> None:
    recipe = RECIPES[name]
    rows = rows_of(150, recipe.geometry.hidden)
    close(whole(recipe.stack(variant=variant), rows), recipe.reference(rows))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_shapes_of_any_size(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kv_heads, head_dim = draw(1, 4), 2 * draw(1, 40)
    geometry = Geometry(draw(1, 140), kv_heads * draw(1, 14), kv_heads, head_dim, draw(1, 140))
    recipe = Recipe(
        geometry,
        layers=1,
        activation=data.draw(st.sampled_from(["silu", "gelu_tanh"])),
        biases=data.draw(st.booleans()),
        head_norms=data.draw(st.booleans()),
        post_norms=data.draw(st.booleans()),
        rotary_width=2 * draw(0, head_dim // 2),
        window=data.draw(st.sampled_from([1, 2, 63, 64, 65, 2**62])),
        softcap=data.draw(st.sampled_from([0.0, 2.0])),
        seed=draw(0, 99),
    )
    variant = data.draw(st.sampled_from(native.variants()))
    rows = rows_of(draw(1, 140), geometry.hidden, draw(0, 9))
    close(whole(recipe.stack(threads=draw(1, 2), variant=variant), rows), recipe.reference(rows), 1e-5)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_used_as_they_unpack(kind: str, variant: str) -> None:
    """The error of quantising is in `unpack`; beyond it there is rounding only."""
    recipe = Recipe(layers=1, rotary_width=0)
    made = recipe.weights()[0]
    gate_up = Matrix(kind, interleave(made["gate"], made["up"]))
    parts = {name: Matrix(kind, made[name]).unpack() for name in ("o", "down")}
    qkv = Matrix(kind, np.concatenate([made["q"], made["k"], made["v"]])).unpack()
    heads = recipe.geometry.heads * recipe.geometry.head_dim
    parts["q"], parts["k"], parts["v"] = np.split(qkv, [heads, heads + (len(qkv) - heads) // 2])
    parts["gate"], parts["up"] = separate(gate_up.unpack(), recipe.geometry.intermediate)
    rounded = {**made, **parts}

    class Rounded(Recipe):
        def weights(self) -> list[dict[str, np.ndarray]]:
            return [rounded]

    rows = rows_of(30, recipe.geometry.hidden)
    stack = recipe.stack(kind, variant=variant)
    close(whole(stack, rows), Rounded(layers=1, rotary_width=0).reference(rows))


def test_rounding_stays_within_half_a_step() -> None:
    weight = rows_of(70, 130) * np.linspace(0.01, 5, 70, dtype=np.float32)[:, None]
    assert np.array_equal(Matrix("float32", weight).unpack(), weight)
    assert np.abs(Matrix("bfloat16", weight).unpack() / weight - 1).max() <= 2**-8
    steps = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(Matrix("int8", weight).unpack() - weight) <= 0.5001 * steps).all()


def test_four_bits_cost_less_than_rounding_over_the_whole_range() -> None:
    weight = rows_of(70, 130) * np.linspace(0.01, 5, 70, dtype=np.float32)[:, None]
    out = Matrix("int4", weight).unpack()
    plain = np.empty_like(weight)
    for start in range(0, 130, 32):
        part = weight[:, start : start + 32]
        least, most = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        step = (most - least) / 15
        plain[:, start : start + 32] = least + step * np.round((part - least) / step)
    assert np.square(out - weight).sum() < 0.9 * np.square(plain - weight).sum()


def test_four_bits_hold_what_was_rounded_to_four_bits() -> None:
    """GGUF's Q4_0 and Q4_1 have a scale, and a minimum, for 32 weights as well."""
    rng = np.random.default_rng(3)
    levels = rng.integers(0, 16, (40, 3, 32)).astype(np.float32)
    scales, lowest = rng.uniform(0.01, 2, (40, 3, 1)).astype(np.float32), rng.uniform(5, 10, (40, 3, 1))
    weight = (scales * (levels - lowest)).astype(np.float32).reshape(40, 96)
    error = np.abs(Matrix("int4", weight).unpack() - weight).reshape(40, 3, 32)
    assert (error <= 2**-8 * 15 * scales).all()  # both are kept in bfloat16: 0.06 of a step


def test_special_rows_of_weights() -> None:
    weight = np.zeros((3, 65), np.float32)
    weight[1] = 0.25
    weight[2, 64] = -3.0
    for kind in KINDS:
        assert np.array_equal(Matrix(kind, weight).unpack(), weight), kind


def test_bytes_are_those_of_the_kind() -> None:
    sizes = {kind: Matrix(kind, np.zeros((64, 128), np.float32)).nbytes for kind in KINDS}
    each = 64 * 128
    assert sizes == {"float32": 4 * each, "bfloat16": 2 * each, "int8": each + 4 * 64, "int4": each * 5 // 8}


def test_gates_and_ups_side_by_side() -> None:
    gate, up = rows_of(37, 5), rows_of(37, 5, seed=1)
    together = interleave(gate, up)
    assert together.shape == (96, 5)
    assert np.array_equal(together[16:32], up[:16])
    assert all(np.array_equal(a, b) for a, b in zip(separate(together, 37), (gate, up), strict=True))


# --- kv ---------------------------------------------------------------------------------------------------------------


def test_pages_come_and_go_with_the_tokens() -> None:
    recipe = Recipe(layers=3)
    stack = recipe.stack()
    cache = stack.new_cache()
    page = 64 * stack.kv_bytes_per_token
    assert (stack.kv_bytes_per_token, cache.nbytes) == (4 * 2 * (10 + 16), 0)
    for position, count, first, last, pages in ((0, 64, 0, 3, 3), (64, 1, 0, 3, 6), (65, 62, 0, 3, 6)):
        stack.forward(first, last, [(cache, position, count)], rows_of(count, 50))
        assert cache.nbytes == pages * page
    cache.truncate(65)
    assert cache.nbytes == 6 * page
    cache.truncate(64)
    assert cache.nbytes == 3 * page
    cache.truncate(0)
    assert cache.nbytes == 0
    stack.forward(1, 2, [(cache, 0, 1)], rows_of(1, 50))
    assert cache.nbytes == page


def test_infinity_that_was_cut_off_leaves_no_trace() -> None:
    stack = Recipe().stack()
    rows = rows_of(20, 50)
    expected = whole(stack, rows)
    cache = stack.new_cache()
    start = rows[:11].copy()
    stack.forward(0, 2, [(cache, 0, 11)], start)
    stack.forward(0, 2, [(cache, 11, 4)], np.full((4, 50), 1e38, np.float32))
    cache.truncate(11)
    rest = rows[11:].copy()
    stack.forward(0, 2, [(cache, 11, 9)], rest)
    assert np.array_equal(np.concatenate([start, rest]), expected)


def test_nothing_is_passed_on_unchecked() -> None:
    stack = Recipe().stack()
    cache = stack.new_cache()
    good = rows_of(3, 50)
    for rows in (good.astype(np.float64), good[:, :49], good[:2], good.T[:, :3], np.asfortranarray(good)):
        with pytest.raises(ValueError, match="rows"):
            stack.forward(0, 2, [(cache, 0, 3)], rows)
    for first, last, position in ((0, 3, 0), (-1, 2, 0), (2, 1, 0), (0, 2, -1), (0, 2, POSITIONS - 2)):
        with pytest.raises(ValueError, match=r"layers|rotary"):
            stack.forward(first, last, [(cache, position, 3)], good)
    assert cache.nbytes == 0
    with pytest.raises(ValueError, match="makes no sense"):
        Stack(Geometry(8, 3, 2, 4, 8))
    with pytest.raises(LookupError, match="this machine runs"):
        Stack(Geometry(8, 2, 2, 4, 8), variant="abacus")


def test_no_rows_and_no_layers_change_nothing() -> None:
    stack = Recipe().stack(threads=2)
    cache, other = stack.new_cache(), stack.new_cache()
    stack.forward(0, 2, [], rows_of(0, 50))
    stack.forward(0, 2, [(cache, 0, 0)], rows_of(0, 50))
    rows = rows_of(3, 50)
    stack.forward(1, 1, [(cache, 0, 3)], rows)
    assert np.array_equal(rows, rows_of(3, 50))
    expected = whole(stack, rows_of(3, 50))
    stack.forward(0, 2, [(cache, 0, 0), (other, 0, 3)], rows)
    assert np.array_equal(rows, expected)


def test_a_cache_may_outlive_whoever_made_it() -> None:
    cache = Recipe().stack().new_cache()
    gc.collect()
    assert cache.nbytes == 0


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def test_memory_goes_back_to_the_system() -> None:
    weight = np.ones((2048, 3072), np.float32)  # 24 MiB
    before = resident()
    matrices = [Matrix("float32", weight) for _ in range(4)]
    held = resident() - before
    del matrices
    kept = resident() - before
    assert held > 3.9 * weight.nbytes
    assert kept < 0.5 * weight.nbytes


PAGE_BYTES = 512 << 10
"""Of kv, in both layers of this: 64 positions of 8 heads."""
WIDE = Recipe(Geometry(16, 8, 8, 64, 16), rotary_width=64)


def test_memory_for_kv_is_found_before_it_is_needed() -> None:
    stack = WIDE.stack()
    cache = stack.new_cache()
    for position in range(0, 128, 64):
        stack.forward(0, 2, [(cache, position, 64)], rows_of(64, 16))
    for _ in range(20):
        stack.prepare()
    before = resident()
    for _ in range(20):
        stack.prepare()
    assert resident() - before < PAGE_BYTES, "enough is enough"
    for position in range(128, 384, 64):
        stack.forward(0, 2, [(cache, position, 64)], rows_of(64, 16))
    assert cache.nbytes == 6 * PAGE_BYTES
    assert resident() - before < 2 * PAGE_BYTES, "four pages were there"


def test_of_the_kv_of_the_last_session_only_the_beginning_is_kept() -> None:
    stack, before = WIDE.stack(), resident()
    caches = [stack.new_cache() for _ in range(24)]
    for _ in range(2):
        for cache in caches:
            stack.forward(0, 2, [(cache, 0, 384)], rows_of(384, 16))
            stack.prepare()
        assert resident() - before > 140 * PAGE_BYTES
        for cache in caches:
            cache.truncate(0)
        assert resident() - before < 80 * PAGE_BYTES, "a region in which weights lie too, and the beginning of the last"
