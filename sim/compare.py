"""Policies side by side: the same scenario and seeds, once for each way to choose a route."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.table import Table

from sim.baselines import POLICIES
from sim.report import Latency, Report, seconds
from sim.scenario import Scenario
from sim.simulation import simulate

TOLERANCE = 0.05
"""Within this share of the best counts as equal: the noise of a few hundred requests."""

ENOUGH = 0.9
"""Who answers a smaller share of what the busiest policy answers has less to wait for, and is not compared."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How ours stands in one measure: 1.0 is as good as the best of all, 1.05 is 5 % worse."""

    measure: str
    ours: float
    best: float
    who: str

    @property
    def ratio(self) -> float:
        """How many times worse than the best."""
        if self.measure == "tokens_per_s":
            return self.best / self.ours if self.ours else float("inf")
        return self.ours / self.best if self.best else 1.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One report a policy, in the order of POLICIES. Of several seeds each report is the mean of theirs."""

    reports: tuple[Report, ...]
    seeds: tuple[int, ...]

    def standings(self) -> list[Standing]:
        """Where ours stands in each of the measures that count."""
        return [
            self._standing("tokens_per_s", lambda report: -report.tokens_per_s),
            self._standing("first_token_p95_s", lambda report: report.first_token.p95_s),
            self._standing("token_p95_s", lambda report: report.token.p95_s),
        ]

    def behind(self) -> list[Standing]:
        """The measures in which another policy is better by more than TOLERANCE."""
        return [standing for standing in self.standings() if standing.ratio > 1 + TOLERANCE]

    @property
    def which(self) -> str:
        """The seeds in words."""
        return in_words(self.seeds)

    @property
    def compared(self) -> list[Report]:
        """Ours, and those that answered about as many requests as anybody: who answers fewer is quicker for it."""
        most = max(report.done for report in self.reports)
        return [report for report in self.reports if report is self.reports[0] or report.done >= ENOUGH * most]

    def rule(self) -> str:
        """Whom `standings` compares, in words."""
        most = max(report.done for report in self.reports)
        left_out = [f"{report.policy} ({report.done:,})" for report in self.reports if report not in self.compared]
        rule = f"best: of the policies that answered at least {ENOUGH:.0%} of what the busiest did ({most:,} requests)"
        return f"{rule}; that leaves out {', '.join(left_out)}" if left_out else f"{rule}: of all"

    def _standing(self, measure: str, key: Callable[[Report], float]) -> Standing:
        best = min(self.compared, key=key)
        return Standing(measure, abs(key(self.reports[0])), abs(key(best)), best.policy)

    def table(self) -> Table:
        """For people: the best of each column is bold."""
        first = self.reports[0]
        table = Table(title=f"{first.scenario}, {self.which}: {first.title}", title_justify="left", box=None, padding=0)
        table.add_column("policy", style="bold", width=12)
        for name in ("tokens/s", "first p50", "first p95", "next p50", "next p95", "next p99", "failed"):
            table.add_column(name, justify="right", width=len(name) + 1)
        for report in self.reports:
            table.add_row(
                report.policy,
                f"{report.tokens_per_s:.1f}",
                *(seconds(value) for value in (report.first_token.p50_s, report.first_token.p95_s)),
                *(seconds(value) for value in (report.token.p50_s, report.token.p95_s, report.token.p99_s)),
                str(report.failed),
            )
        table.add_row("bound", f"{first.bound_tokens_per_s:.1f}", *[""] * 6, style="dim")
        return table


@dataclass(frozen=True, slots=True)
class _Job:
    scenario: Scenario
    source: str

    def __call__(self, run: tuple[str, int]) -> Report:
        policy, seed = run
        return simulate(self.scenario, seed, policy=policy, source=self.source, thorough=False)


def compare(
    scenario: Scenario,
    seeds: Sequence[int],
    *,
    policies: Sequence[str] = POLICIES,
    source: str = "",
    processes: int | None = None,
    heard: Callable[[Report], None] = lambda report: None,
) -> Comparison:
    """Run the scenario once for each policy and seed, in parallel processes. `heard` is told of each run."""
    job = _Job(scenario, source)
    runs = [(policy, seed) for policy in policies for seed in seeds]
    workers = min(processes or os.cpu_count() or 1, len(runs))
    reports: list[Report] = []
    if workers == 1:
        for run in runs:
            reports.append(job(run))
            heard(reports[-1])
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for report in pool.imap(job, runs):
                reports.append(report)
                heard(report)
    groups = [reports[first : first + len(seeds)] for first in range(0, len(reports), len(seeds))]
    return Comparison(tuple(map(_together, groups)), tuple(seeds))


def in_words(seeds: Sequence[int]) -> str:
    """`seed 7`, or `seeds 7 to 9`."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _together(reports: Sequence[Report]) -> Report:
    """What is compared, of all seeds of a policy: sums of requests, and means."""
    broken = next((report for report in reports if report.violations), reports[0])
    return replace(
        broken,
        requests=sum(report.requests for report in reports),
        done=sum(report.done for report in reports),
        failed=sum(report.failed for report in reports),
        refused=sum(report.refused for report in reports),
        tokens_per_s=fmean(report.tokens_per_s for report in reports),
        bound_tokens_per_s=fmean(report.bound_tokens_per_s for report in reports),
        first_token=Latency.mean([report.first_token for report in reports]),
        token=Latency.mean([report.token for report in reports]),
    )


def draw(comparison: Comparison, path: Path) -> None:
    """Bars: throughput, and the latencies of each policy."""
    from matplotlib.figure import Figure

    reports = comparison.reports
    first = reports[0]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(f"{first.scenario}: {first.title} ({first.peers} peers, {comparison.which})", fontsize=11)
    rate, prompt, token = figure.subplots(1, 3)
    names = [report.policy for report in reports]
    colours = ["#0072b2" if report.policy == "ours" else "#aaaaaa" for report in reports]
    rate.bar(names, [report.tokens_per_s for report in reports], color=colours)
    rate.set_title(f"tokens/s (maximum flow: {first.bound_tokens_per_s:,.0f})", fontsize=9)
    for axes, title, key in (
        (prompt, "first token, s: p50, p95", "first_token"),
        (token, "next tokens, s: p50, p95", "token"),
    ):
        axes.bar(names, [getattr(report, key).p95_s for report in reports], color=colours, alpha=0.55)
        axes.bar(names, [getattr(report, key).p50_s for report in reports], color=colours)
        axes.set_title(title, fontsize=9)
    for axes in (rate, prompt, token):
        axes.tick_params(axis="x", rotation=50, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, lw=0.5)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
