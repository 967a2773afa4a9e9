"""A short hunt through random kills, hangs and restarts; longer ones are `python -m sim hunt`."""

import pytest

import sim.hunt
from sim.hunt import hunt
from sim.scenario import load, resize

SEEDS = 50


def test_a_short_hunt_finds_nothing() -> None:
    scenario = resize(load("churn"), peers=9, clients=3, duration_s=12)
    verdicts = hunt(scenario, range(SEEDS))
    problems = [
        f"seed {verdict.seed}: {verdict.problem}\n  {verdict.replay}" for verdict in verdicts if verdict.problem
    ]
    assert not problems, "\n".join(problems)
    assert [verdict.seed for verdict in verdicts] == list(range(SEEDS))
    assert sum(verdict.failovers for verdict in verdicts) > SEEDS // 2, "the faults must hit somebody"


def test_a_storm_breaks_nothing() -> None:
    scenario = resize(load("storm"), duration_s=20)
    verdicts = hunt(scenario, range(12))
    assert [(verdict.seed, verdict.problem) for verdict in verdicts if verdict.problem] == []
    assert sum(verdict.failovers for verdict in verdicts) > 12, "the faults must hit somebody"


def test_a_crash_of_the_simulator_is_a_finding_with_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object, **options: object) -> None:
        raise ZeroDivisionError("in the simulator")

    monkeypatch.setattr(sim.hunt, "simulate", crash)
    [verdict] = hunt(load("steady"), [7], processes=1)
    assert verdict.seed == 7
    assert verdict.problem.startswith("ZeroDivisionError: in the simulator")
    assert verdict.replay == "python -m sim run steady --peers 24 --clients 16 --duration 120 --seed 7"
