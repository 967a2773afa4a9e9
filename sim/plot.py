"""The timeline of a run as a picture: peers and coverage, throughput, latency. Needs matplotlib (the extra `plot`)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmasos.errors import UsageError
from sim.report import Report

INK, BLUE, ORANGE, GREEN, RED, GREY = "#222222", "#0072b2", "#d55e00", "#009e73", "#cc3311", "#999999"
"""Told apart by people who see colours differently, too."""


def check(path: Path) -> None:
    """Raise UsageError, before anything is run, when nothing could be drawn to `path`."""
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"cannot plot to {path}", hint="give a file that ends in .png or .svg")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"cannot plot to {path}: there is no folder {path.absolute().parent}")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed", hint="pip install 'llmasos[plot]'")


def draw(report: Report, path: Path) -> None:
    """The timeline of one run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    peers, cover, rate, latency = figure.subplots(4, 1, sharex=True, height_ratios=[1.2, 0.8, 1, 1.2])
    figure.suptitle(
        f"{report.scenario}: {report.title}\n{report.peers} peers, {report.blocks} blocks, {report.clients} clients, "
        f"seed {report.seed}",
        fontsize=11,
    )
    at = [sample.at_s for sample in report.timeline]
    _peers(peers, at, report)
    cover.step(at, [sample.weakest_block_peers for sample in report.timeline], color=BLUE, lw=1.2, where="post")
    gaps = [sample.missing_blocks > 0 for sample in report.timeline]
    if any(gaps):
        cover.fill_between(at, 0, 1, where=gaps, transform=cover.get_xaxis_transform(), color=RED, alpha=0.25, lw=0)
    cover.set_ylim(bottom=0)
    cover.set_ylabel("peers of the\\nweakest block".replace("\\n", "\n"))
    rate.plot(at, [sample.tokens_per_s for sample in report.timeline], color=GREEN, lw=1.2)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("tokens/s")
    timed = [sample for sample in report.timeline if sample.token.count]
    when = [sample.at_s for sample in timed]
    for name, colour in (("p50_s", BLUE), ("p95_s", ORANGE), ("p99_s", RED)):
        latency.plot(when, [getattr(sample.token, name) for sample in timed], color=colour, lw=1.1, label=name[:3])
    if timed:
        latency.set_yscale("log")
        latency.legend(loc="upper right", ncols=3, fontsize=8, frameon=False)
    latency.set_ylabel("seconds a token")
    latency.set_xlabel("virtual seconds")
    for axes in (peers, cover, rate, latency):
        axes.grid(alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _peers(axes: Any, at: list[float], report: Report) -> None:
    states = (("online", BLUE), ("leaving", ORANGE), ("hung", RED), ("joining", GREEN))
    rows = [[getattr(sample, state) for sample in report.timeline] for state, _ in states]
    axes.stackplot(
        at, rows, labels=[state for state, _ in states], colors=[c for _, c in states], alpha=0.75, step="post"
    )
    axes.legend(loc="lower right", ncols=4, fontsize=8, frameon=True, framealpha=0.8, edgecolor="none")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("peers")
