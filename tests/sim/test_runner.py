"""The arithmetic of simulated blocks."""

import random

import pytest

from llmasos.span import Span
from sim.runner import NUMBERS, A, C, blocks_of, reference

BLOCKS = 7


def rows_of(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(NUMBERS) for _ in range(count)]


def through(span: Span, rows: list[int]) -> list[int]:
    """What a peer makes of rows that come one by one from position 0 on."""
    number, outputs = 0, []
    for position, row in enumerate(rows):
        number, output = blocks_of(span).make(row, position, number)
        outputs.append(output)
    return outputs


def test_blocks_make_what_the_formula_says() -> None:
    numbers = rows_of(5, 41)
    before = [0, *numbers]

    def standing(block: int) -> list[int]:
        return [(A**block * v + before[p] + C**block * (p + 1)) % NUMBERS for p, v in enumerate(numbers)]

    assert reference(BLOCKS, standing(0)) == standing(BLOCKS)
    assert through(Span(3, 5), standing(3)) == standing(5)


def test_blocks_do_not_care_where_they_are_cut() -> None:
    rows = rows_of(6, 50)
    assert through(Span(33, 100), through(Span(0, 33), rows)) == reference(100, rows)


def test_the_factors_are_of_a_field_in_which_no_mistake_fades() -> None:
    assert all(pow(base, NUMBERS - 1, NUMBERS) == 1 for base in range(2, 40)), "not a prime"
    powers = {pow(A, edge, NUMBERS) for edge in range(1_000)}
    assert len(powers) == 1_000


@pytest.mark.parametrize(
    "mistake",
    [
        lambda rows: [*rows[:5], *rows[6:], 1],
        lambda rows: [*rows[:6], *rows[5:-1]],
        lambda rows: [*rows[:5], rows[6], rows[5], *rows[7:]],
        lambda rows: [*rows[:5], rows[5] ^ 1, *rows[6:]],
        lambda rows: [0, *rows[1:]],
    ],
    ids=["lost", "repeated", "reordered", "one bit", "the first"],
)
def test_a_mistake_is_seen_in_every_row_behind_it(mistake: "object") -> None:
    rows = through(Span(0, 3), rows_of(7, 30))
    right, wrong = through(Span(3, BLOCKS), rows), through(Span(3, BLOCKS), mistake(rows))  # type: ignore[operator]
    assert not any(a == b for a, b in zip(right[6:], wrong[6:], strict=True))


def test_blocks_in_the_wrong_order_or_twice_are_seen_in_every_row() -> None:
    rows = rows_of(8, 30)
    right = reference(BLOCKS, rows)
    for spans in [(Span(3, 7), Span(0, 3)), (Span(0, 3),), (Span(0, 3), Span(0, 3), Span(3, 7)), (Span(3, 7),)]:
        made = rows
        for span in spans:
            made = through(span, made)
        assert not any(a == b for a, b in zip(right, made, strict=True)), spans
