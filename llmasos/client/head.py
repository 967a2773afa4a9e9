"""The head of a model, shared by all generations of a process.

One row takes the head about as long as sixteen, because reading its weights is what takes the time (docs/log.md). So
rows that arrive together are scored together, whoever they belong to.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from llmasos.blocks.ends import ModelEnds

MAX_ROWS = 64
"""Rows scored at once: with 150,000 tokens in a vocabulary they take 40 MB."""
GATHER_S = 0.001
"""How long the head waits for the next rows to join those that wait: a fifth of what it takes for one row."""


@dataclass(slots=True)
class _Waiting:
    rows: torch.Tensor
    answer: asyncio.Future[torch.Tensor]


class SharedHead:
    """Scores rows on `thread`."""

    def __init__(self, ends: ModelEnds, thread: Executor) -> None:
        self.calls = 0
        self._ends = ends
        self._thread = thread
        self._expected = 0
        self._waiting: list[_Waiting] = []
        self._rounds: asyncio.Task[None] | None = None

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Around the step that brings rows, and around their scoring: the rows of others may wait a moment for them."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1

    async def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> (rows, vocab), float32. At most MAX_ROWS at a time."""
        answer: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(rows, answer))
        if self._rounds is None:
            self._rounds = asyncio.create_task(self._serve(), name="head")
        return await answer

    async def _serve(self) -> None:
        """Score until nobody waits. What goes wrong is told to those it concerns."""
        try:
            while self._waiting:
                await self._gather()
                batch = self._take()
                try:
                    logits = await self._score(torch.cat([waiting.rows for waiting in batch]))
                except Exception as error:  # noqa: BLE001 - whoever waits is told, and raises it
                    for waiting in batch:
                        if not waiting.answer.done():
                            waiting.answer.set_exception(error)
                    continue
                parts = torch.split(logits, [len(waiting.rows) for waiting in batch])
                for waiting, part in zip(batch, parts, strict=True):
                    if not waiting.answer.done():  # its generation may have been cancelled
                        waiting.answer.set_result(part)
        finally:
            self._rounds = None

    async def _gather(self) -> None:
        """Rows that shared a pass of a peer come back one after the other."""
        while (waiting := len(self._waiting)) < self._expected:
            await asyncio.sleep(GATHER_S)
            if len(self._waiting) == waiting:
                return

    def _take(self) -> list[_Waiting]:
        count, rows = 0, 0
        while count < len(self._waiting) and (not count or rows + len(self._waiting[count].rows) <= MAX_ROWS):
            rows += len(self._waiting[count].rows)
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    async def _score(self, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ends.logits, rows)
