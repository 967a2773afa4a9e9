"""The arithmetic of simulated blocks: the fast way and the plain one."""

import random

from llmasos.span import Span
from sim.runner import NUMBERS, A, B, C, blocks_of, reference


def test_blocks_as_a_running_sum_make_what_the_formula_says() -> None:
    rng = random.Random(5)
    rows = [rng.randrange(NUMBERS) for _ in range(41)]
    outputs = []
    before = [0] * 7
    for position, row in enumerate(rows):
        for block in range(7):
            row = (A * (before[block] + row) + B * (block + 1) + C * (position + 1)) % NUMBERS
            before[block] = row
        outputs.append(row)
    assert reference(7, rows) == outputs


def test_blocks_do_not_care_where_they_are_cut() -> None:
    rng = random.Random(6)
    whole, first, second = blocks_of(Span(0, 100)), blocks_of(Span(0, 33)), blocks_of(Span(33, 100))
    made, early, late = whole.nothing, first.nothing, second.nothing
    for position in range(50):
        row = rng.randrange(NUMBERS)
        made = whole.make(row, position, made)
        early = first.make(row, position, early)
        late = second.make(first.last(early), position, late)
        assert second.last(late) == whole.last(made)
