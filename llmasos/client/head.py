"""The head of a model, shared by all generations of a process.

One row takes the head about as long as sixteen, because reading its weights is what takes the time (docs/log.md). So
rows that are waiting when the head becomes free are scored together, whoever they belong to.
"""

import asyncio
from concurrent.futures import Executor
from queue import SimpleQueue

import torch

from llmasos.blocks.ends import ModelEnds

Waiting = tuple[torch.Tensor, "asyncio.Future[torch.Tensor]"]

MAX_ROWS = 64
"""Rows scored at once: with 150,000 tokens in a vocabulary they take 40 MB."""


class SharedHead:
    """Scores rows on `thread`, which must be a single one."""

    def __init__(self, ends: ModelEnds, thread: Executor) -> None:
        self.calls = 0
        self._ends = ends
        self._thread = thread
        self._waiting: SimpleQueue[Waiting] = SimpleQueue()

    async def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> (rows, vocab), float32. At most MAX_ROWS at a time."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[torch.Tensor] = loop.create_future()
        self._waiting.put((rows, answer))
        # Each caller asks for a round; the first takes all who wait by then, and the others find nobody left.
        await loop.run_in_executor(self._thread, self._score_waiting, loop)
        return await answer

    def _score_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        batch: list[Waiting] = []
        while sum(len(rows) for rows, _ in batch) < MAX_ROWS and not self._waiting.empty():
            batch.append(self._waiting.get_nowait())  # this thread is the only one that takes
        if not batch:
            return
        self.calls += 1
        logits = self._ends.logits(torch.cat([rows for rows, _ in batch]))
        start = 0
        for rows, answer in batch:
            loop.call_soon_threadsafe(_settle, answer, logits[start : start + len(rows)])
            start += len(rows)


def _settle(answer: "asyncio.Future[torch.Tensor]", logits: torch.Tensor) -> None:
    if not answer.done():  # its generation may have been cancelled
        answer.set_result(logits)
