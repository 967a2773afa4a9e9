"""Who is waited for before a prompt: those who are usually back in a moment, and not for long."""

import pytest

from llmasos.peer.absences import LATE, Absences


def away(*times: float, since: float) -> Absences:
    """`a` has been away for these times, and is again."""
    absences, now = Absences(), 0.0
    for gone_s in times:
        absences.leaves("a", now)
        now += gone_s
        absences.returns("a", now)
    absences.leaves("a", since)
    return absences


def test_who_is_usually_back_soon_is_waited_for_until_late() -> None:
    absences = away(0.010, 0.010, since=5.0)
    assert absences.wait_s(5.0, within_s=0.02) == pytest.approx(LATE * 0.010)
    assert absences.wait_s(5.006, within_s=0.02) == pytest.approx(LATE * 0.010 - 0.006)
    assert absences.wait_s(5.016, within_s=0.02) == 0


def test_who_is_usually_away_for_longer_is_waited_for_at_the_end_of_it() -> None:
    absences = away(0.100, since=5.0)
    assert absences.wait_s(5.0, within_s=0.02) == 0
    assert absences.wait_s(5.09, within_s=0.02) == pytest.approx(0.03)


def test_who_is_away_for_too_long_is_not_waited_for_even_at_the_end_of_it() -> None:
    absences = away(0.100, since=5.0)
    assert absences.wait_s(5.09, within_s=0.02, away_s=0.099) == 0
    assert absences.wait_s(5.09, within_s=0.02, away_s=0.100) == pytest.approx(0.03)


def test_who_is_away_for_the_first_time_is_waited_for_once() -> None:
    absences = away(since=5.0)
    assert absences.wait_s(5.004, within_s=0.02) == pytest.approx(0.016)
    assert absences.wait_s(5.004, within_s=0.02, away_s=0.02) == 0, "by no pass over tokens"
    absences.returns("a", 5.1)
    absences.leaves("a", 5.2)
    assert absences.wait_s(5.2, within_s=0.02) == 0, "it takes too long, as is known now"


def test_nobody_waits_for_who_is_here_or_for_who_is_gone() -> None:
    absences = away(since=5.0)
    absences.returns("b", 5.0)
    absences.forget("a")
    assert absences.wait_s(5.0, within_s=1.0) == 0, "who has never left is here"
    absences = away(0.010, since=5.0)
    absences.returns("a", 5.002)
    assert absences.wait_s(5.002, within_s=1.0) == 0
    absences = away(0.010, since=5.0)
    absences.forget("a")
    assert absences.wait_s(5.0, within_s=1.0) == 0


def test_who_came_back_sooner_once_is_expected_that_soon() -> None:
    absences = away(0.040, 0.040, 0.010, since=5.0)
    assert absences.wait_s(5.0, within_s=0.02) == pytest.approx(LATE * 0.010)
    absences = away(0.010, 0.040, since=5.0)
    assert absences.wait_s(5.0, within_s=0.02) == pytest.approx(LATE * 0.0175), "and one time that was longer is noise"


def test_the_last_of_several_counts_and_the_habit_follows() -> None:
    absences = away(*[0.010] * 3, *[0.020] * 40, since=5.0)
    assert absences.wait_s(5.0, within_s=0.03) == pytest.approx(LATE * 0.020, rel=0.01)
    absences.leaves("b", 4.0)
    absences.returns("b", 4.004)
    absences.leaves("b", 5.001)
    assert absences.wait_s(5.001, within_s=0.03) == pytest.approx(LATE * 0.020 - 0.001, rel=0.01)
