"""Rows of prompts beside tokens: as many as the passes themselves say can be afforded."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.config import PROMPT_STRETCH
from llmasos.peer.pace import MIN_ROWS, SHRINK, Pace

ALONE_S, ROW_S = 0.010, 0.0005
AT_FIRST = int((PROMPT_STRETCH - 1) * ALONE_S / ROW_S)


def follow(pace: Pace, pass_s: Callable[[int], float], passes: int = 60) -> int:
    """A token and prompts, again and again."""
    for _ in range(passes):
        rows = 1 + pace.rows
        pace.ran(rows, pass_s(rows))
    return pace.rows


def linear(row_s: float, alone_s: float = ALONE_S) -> Callable[[int], float]:
    return lambda rows: alone_s + (rows - 1) * row_s


@pytest.mark.parametrize("change", [1.0, 1.4, 0.3])
def test_a_pass_stretches_as_far_as_it_may_whatever_rows_come_to_cost(change: float) -> None:
    pace = Pace(ALONE_S, ROW_S, 256)
    assert pace.rows == AT_FIRST
    rows = follow(pace, linear(change * ROW_S))
    longest = PROMPT_STRETCH * ALONE_S
    assert longest - change * ROW_S <= linear(change * ROW_S)(1 + rows) <= longest + 1e-9


def test_prompts_go_on_on_a_machine_that_others_slow_down() -> None:
    pace = Pace(ALONE_S, ROW_S, 256)
    assert follow(pace, linear(20 * ROW_S)) == AT_FIRST // SHRINK
    assert follow(pace, linear(ROW_S)) == pytest.approx(AT_FIRST, abs=1)


def test_few_rows_are_taken_where_rows_are_dear_and_no_more_than_fit() -> None:
    assert Pace(ALONE_S, 10 * ROW_S, 256).rows == MIN_ROWS
    assert Pace(ALONE_S, 10 * ROW_S, 4).rows == 4
    assert Pace(ALONE_S, ROW_S / 100, 256).rows == 256
    assert follow(Pace(ALONE_S, ROW_S, 64), lambda _: ALONE_S) == 64, "rows that cost nothing"


def test_what_a_token_takes_is_followed_too() -> None:
    pace = Pace(3 * ALONE_S, ROW_S, 256)  # measured in a bad moment
    for _ in range(60):
        pace.ran(1, ALONE_S)
    assert pace.alone_s == pytest.approx(ALONE_S)
    assert follow(pace, linear(ROW_S)) == pytest.approx(3 * AT_FIRST // SHRINK, abs=1)


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0, 10))), st.integers(1, 300))
def test_it_stays_between_its_bounds_whatever_passes_take(passes: list[tuple[int, float]], most: int) -> None:
    pace = Pace(ALONE_S, ROW_S, most)
    for rows, seconds in passes:
        pace.ran(rows, seconds)
        assert min(MIN_ROWS, most) <= pace.rows <= most
