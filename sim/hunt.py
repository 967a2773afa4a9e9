"""Many seeds in parallel processes, until one of them fails.

Each seed is a run of its own in virtual time; what is looked for are violations (`sim.invariants`). The first failing
seed, in the order of seeds, is reported with the command that replays it.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sim.scenario import Scenario
from sim.simulation import replay_command, simulate


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one seed came to; `problem` is empty when everything held."""

    seed: int
    problem: str
    replay: str
    requests: int
    failovers: int
    tokens: int
    checks: int


@dataclass(frozen=True, slots=True)
class _Job:
    scenario: Scenario
    source: str

    def __call__(self, seed: int) -> Verdict:
        try:
            report = simulate(self.scenario, seed, source=self.source)
        except Exception as error:  # noqa: BLE001 - a crash of the simulator itself is a finding as well
            place = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({place.name} in {place.filename}:{place.lineno})"
            return Verdict(seed, problem, replay_command(self.scenario, seed, self.source), 0, 0, 0, 0)
        problem = report.violations[0] if report.violations else ""
        return Verdict(seed, problem, report.replay, report.requests, report.failovers, report.tokens, report.checks)


def hunt(
    scenario: Scenario,
    seeds: Iterable[int],
    *,
    source: str = "",
    processes: int | None = None,
    heard: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Run every seed; the verdicts in the order of seeds. `heard` is told of each as soon as it is known."""
    job = _Job(scenario, source or scenario.name)
    wanted = list(seeds)
    workers = min(processes or os.cpu_count() or 1, len(wanted)) or 1
    verdicts: list[Verdict] = []
    if workers == 1:
        for seed in wanted:
            verdicts.append(job(seed))
            heard(verdicts[-1])
        return verdicts
    # A fresh interpreter each: nothing of this process, its loop or its threads comes along.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for verdict in pool.imap(job, wanted):
            verdicts.append(verdict)
            heard(verdict)
    return verdicts
