"""The promise: a row's bits do not depend on its company, on how its prompt was cut, or on the number of threads."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmasos.blocks import native
from llmasos.blocks.native.stack import KINDS, Array, Cache, Geometry, Stack
from tests.native.conftest import Recipe, rows_of, whole

HIDDEN = 70
RECIPES = [
    Recipe(Geometry(HIDDEN, 6, 2, 24, 90), rotary_width=24),
    Recipe(Geometry(HIDDEN, 4, 4, 10, 40), biases=True, window=67, head_norms=True),
    Recipe(Geometry(HIDDEN, 13, 1, 16, 40), post_norms=True, softcap=2.0, activation="gelu_tanh", rotary_width=8),
]
LENGTH = 140


@cache
def stack_of(recipe: int, kind: str, threads: int, variant: str) -> Stack:
    return RECIPES[recipe].stack(kind, threads, variant)


@cache
def alone(recipe: int, kind: str, variant: str, session: int) -> Array:
    """Each session's rows with nobody else, in one piece, with one thread."""
    return whole(stack_of(recipe, kind, 1, variant), rows_of(LENGTH, HIDDEN, session))


@pytest.mark.parametrize("recipe", range(len(RECIPES)))
def test_a_row_that_is_no_number_leaves_nothing_behind(recipe: int) -> None:
    stack = RECIPES[recipe].stack("float32", 1, native.variants()[0])
    expected = whole(stack, rows_of(1, HIDDEN, 3))
    whole(stack, np.full((1, HIDDEN), np.nan, np.float32))
    assert np.array_equal(whole(stack, rows_of(1, HIDDEN, 3)), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_session_has_the_same_bits_in_any_company(data: st.DataObject) -> None:
    recipe = data.draw(st.integers(0, len(RECIPES) - 1))
    kind = data.draw(st.sampled_from(list(KINDS)))
    variant = data.draw(st.sampled_from(native.variants()))
    stack = stack_of(recipe, kind, data.draw(st.integers(1, 3)), variant)
    sessions: dict[int, tuple[Cache, int]] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        wanted = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True))
        chunks, inputs, places = [], [], []
        for session in wanted:
            kv, held = sessions.get(session, (stack.new_cache(), 0))
            if held and data.draw(st.booleans()):
                held = data.draw(st.integers(0, held))  # roll back
                kv.truncate(held)
            count = min(data.draw(st.sampled_from([1, 1, 1, 0, 2, 7, 13, 64, 100])), LENGTH - held)
            chunks.append((kv, held, count))
            inputs.append(rows_of(LENGTH, HIDDEN, session)[held : held + count])
            places.append((session, held, count))
            sessions[session] = (kv, held + count)
        rows = np.concatenate(inputs)
        stack.forward(0, stack.layers, chunks, rows)
        start = 0
        for session, held, count in places:
            expected = alone(recipe, kind, variant, session)[held : held + count]
            assert np.array_equal(rows[start : start + count].view(np.uint32), expected.view(np.uint32))
            start += count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", range(len(RECIPES)))
def test_avx2_and_avx512_give_the_same_bits(recipe: int, kind: str) -> None:
    if not {"avx2", "avx512"} <= set(native.variants()):
        pytest.skip("this machine does not run both")
    assert np.array_equal(alone(recipe, kind, "avx2", 0), alone(recipe, kind, "avx512", 0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_count_gives_the_same_bits(kind: str) -> None:
    """At widths of a real model, where rows of x do not fit into a cache and are taken in blocks."""
    recipe = Recipe(Geometry(576, 9, 3, 64, 1536), layers=1, rotary_width=64)
    rows = rows_of(300, 576)
    for variant in native.variants():
        stack = recipe.stack(kind, 2, variant)
        together = whole(stack, rows)
        for cuts in ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 24, 25, 160], [299, 1]):
            kv, done, parts = stack.new_cache(), 0, []
            for count in cuts:
                part = rows[done : done + count].copy()
                stack.forward(0, 1, [(kv, done, count)], part)
                parts.append(part)
                done += count
            assert np.array_equal(np.concatenate(parts), together), (variant, cuts)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_forks_share_bytes_and_nothing_else(data: st.DataObject) -> None:
    """Sessions that fork, are cut back and go on have the bits of sessions that were always alone."""
    recipe = data.draw(st.integers(0, len(RECIPES) - 1))
    variant = native.variants()[0]
    stack = stack_of(recipe, "float32", 1, variant)
    expected, rows = alone(recipe, "float32", variant, 0), rows_of(LENGTH, HIDDEN, 0)
    caches: list[tuple[Cache, int]] = [(stack.new_cache(), 0)]
    for _ in range(data.draw(st.integers(1, 12))):
        index = data.draw(st.integers(0, len(caches) - 1))
        cache, held = caches[index]
        match data.draw(st.sampled_from(["go on", "cut back", "fork", "drop"])):
            case "go on" if held < LENGTH:
                some = data.draw(st.integers(1, LENGTH - held))
                part = rows[held : held + some].copy()
                stack.forward(0, stack.layers, [(cache, held, some)], part)
                assert np.array_equal(part, expected[held : held + some])
                caches[index] = cache, held + some
            case "cut back":
                held = data.draw(st.integers(0, held))
                cache.truncate(held)
                caches[index] = cache, held
            case "fork":
                shared = data.draw(st.integers(0, held // 64)) * 64
                caches.append((cache.fork(shared), shared))
            case "drop" if len(caches) > 1:
                del caches[index]
