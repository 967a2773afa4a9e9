"""The cost model of the simulator, measured on this machine: what a pass takes, by the rows that are in it.

A pass of `n` rows is taken to need `first_row_s + (n - 1) * row_s` for each block (`llmasos.peer.runner.Speed`, as a
peer announces it). Here the real runner runs passes of 1 to 128 rows - one row for each of several sessions,
as in decoding, and many rows of one session, as in a prompt - and the line through their medians is what scenarios take
as `block_ms` and `row_ms`.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from llmasos.errors import LLMasOSError
from llmasos.peer.runner import Chunk, Fault, Runner, Speed
from llmasos.span import Span

DECODING = (1, 2, 4, 8, 16)
"""Sessions with one row each."""
PROMPTS = (16, 32, 64, 128)
"""Rows of a single session."""
PASSES = 9
"""Of each size; the median counts."""
CACHED_TOKENS = 64
"""What each session has behind it, as in the middle of a short answer."""


@dataclass(frozen=True, slots=True)
class Point:
    """One size of pass: `sessions` with `rows` each, and the seconds that one block took of it."""

    sessions: int
    rows: int
    block_s: float

    @property
    def total_rows(self) -> int:
        """Of all sessions."""
        return self.sessions * self.rows


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured, and the line through it."""

    model: str
    span: Span
    points: tuple[Point, ...]
    speed: Speed

    @property
    def worst_error(self) -> float:
        """The largest share by which the line misses a point."""
        return max(abs(self.predict(point) / point.block_s - 1) for point in self.points)

    def predict(self, point: Point) -> float:
        """What the line says of a pass."""
        return self.speed.first_row_s + (point.total_rows - 1) * self.speed.row_s

    def as_toml(self) -> str:
        """The lines for a scenario."""
        return f"[peers]\nblock_ms = {1e3 * self.speed.first_row_s:.4f}\nrow_ms = {1e3 * self.speed.row_s:.4f}\n"


def fit(points: Sequence[Point]) -> Speed:
    """The line that misses the points by the smallest shares (weighted least squares); never below zero."""
    weights = [1 / point.block_s**2 for point in points]
    xs, ys = [point.total_rows - 1 for point in points], [point.block_s for point in points]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, xs, ys, strict=True))
    slope /= max(sum(w * (x - mean_x) ** 2 for w, x in zip(weights, xs, strict=True)), 1e-12)
    slope = max(slope, 1e-7)
    return Speed(first_row_s=max(mean_y - slope * mean_x, 1e-6), row_s=slope)


async def calibrate(model: str, span: Span) -> Calibration:
    """Measure the blocks `span` of a model, as a peer would run them; a minute at the most."""
    # Thread pools that spin beside each other are no measure of anything (docs/log.md): as `sim local` starts peers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from llmasos.blocks.layers import load_blocks
    from llmasos.blocks.registry import resolve
    from llmasos.blocks.tensors import from_torch
    from llmasos.peer.torch_runner import TorchRunner

    torch.set_num_threads(1)
    runner = TorchRunner(load_blocks(resolve(model), span))
    noise = torch.Generator().manual_seed(7)
    points = []
    try:
        for sessions, rows in [*((count, 1) for count in DECODING), *((1, count) for count in PROMPTS)]:
            names = [f"{sessions} {rows} {index}" for index in range(sessions)]
            before = from_torch(torch.randn(CACHED_TOKENS, runner.hidden_size, generator=noise))
            await _pass_s(runner, [Chunk(name, span, 0, before) for name in names])
            taken = []
            for _ in range(PASSES):
                hidden = from_torch(torch.randn(rows, runner.hidden_size, generator=noise))
                taken.append(await _pass_s(runner, [Chunk(name, span, CACHED_TOKENS, hidden) for name in names]))
            for name in names:
                runner.release(name)
            points.append(Point(sessions, rows, statistics.median(taken) / len(span)))
    finally:
        await runner.close()
    return Calibration(model, span, tuple(points), fit(points))


async def _pass_s(runner: Runner, chunks: Sequence[Chunk]) -> float:
    """What a pass takes. Raises LLMasOSError if there are no rows at its end."""
    begin = time.perf_counter()
    results = await runner.run(chunks)
    taken_s = time.perf_counter() - begin
    for result in results:
        if isinstance(result, Fault):
            raise LLMasOSError(f"these blocks do not run here: {result.message}")
    return taken_s
