"""Guessing from the text: what is guessed, and when it is worth it."""

import pytest

from llmasos.client.speculation import FIRST_GUESSES, MAX_GUESSES, MAX_LOSS, NgramIndex, Speculator


def test_what_followed_last_time_is_guessed() -> None:
    index = NgramIndex()
    index.extend([5, 6, 7, 8, 9, 1, 5, 6])
    assert index.guess(2) == [7, 8]
    assert index.guess(9) == [7, 8, 9, 1, 5, 6, 7, 8, 9]
    index.extend([7])
    assert index.guess(1) == [8]


def test_the_longer_run_and_the_later_place_win() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 40, 0, 9, 2, 3, 50, 0, 1, 2, 3])
    assert index.guess(1) == [40]  # 1 2 3 was followed by 40; 2 3 alone, later, by 50
    index.extend([60, 7, 2, 3])
    assert index.guess(1) == [60]


def test_nothing_is_guessed_of_what_never_occurred() -> None:
    index = NgramIndex()
    assert index.guess(3) == []
    index.extend([1])
    assert index.guess(3) == []
    index.extend([2, 3, 4, 5])
    assert index.guess(3) == []


def repeating() -> Speculator:
    speculator = Speculator([1, 2, 3, 4, 5, 6, 7] * 6)
    assert speculator.propose(10) == []  # nothing is known of what a step takes
    speculator.took(0.10, 0, 0)
    return speculator


def test_right_guesses_make_it_bolder_and_wrong_ones_shyer() -> None:
    speculator = repeating()
    assert len(speculator.propose(30)) == FIRST_GUESSES
    for _ in range(4):
        guesses = len(speculator.propose(30))
        speculator.took(0.11, guesses, guesses)
    assert len(speculator.propose(30)) == MAX_GUESSES
    assert len(speculator.propose(3)) == 3
    speculator.took(0.11, MAX_GUESSES, 1)
    assert len(speculator.propose(30)) == 2


@pytest.mark.parametrize("price", [0.03, 0.3, 0.9])
def test_guesses_that_never_come_true_cost_a_fiftieth_and_one_try(price: float) -> None:
    """`price` is what a step with guesses takes longer, as a share of a plain one."""
    speculator = repeating()
    steps, tries, last = 600, 0, 0
    for number in range(steps):
        guessed = len(speculator.propose(8))
        speculator.took(0.10 * (1 + price * (guessed > 0)), guessed, 0)
        if guessed:
            tries, last = tries + 1, number
    assert tries * price <= MAX_LOSS * steps + price
    assert tries * price >= 0.5 * MAX_LOSS * (steps - tries)  # as often as may be: the text may change
    assert steps - last < 1 / MAX_LOSS


def test_guesses_that_come_true_again_are_made_again() -> None:
    speculator = repeating()
    for _ in range(5):
        speculator.took(0.15, FIRST_GUESSES, 0)
    assert not speculator.pays
    assert not speculator.propose(8)
    for _ in range(60):
        speculator.took(0.10, 0, 0)
    assert speculator.propose(8)
    for _ in range(3):
        speculator.took(0.15, FIRST_GUESSES, FIRST_GUESSES)
    assert speculator.pays
    assert speculator.propose(8)


def test_a_step_that_was_late_for_another_reason_does_not_end_the_tries() -> None:
    speculator = repeating()
    speculator.took(30.0, FIRST_GUESSES, 0)
    waited = 0
    while not speculator.propose(8):
        speculator.took(0.10, 0, 0)
        waited += 1
        assert waited <= 1 / MAX_LOSS + 1


def test_a_step_that_costs_nothing_more_pays_with_any_right_guess() -> None:
    speculator = repeating()
    for _ in range(40):
        speculator.took(0.10, 2, 1)
    assert speculator.pays
