"""The head of a model, shared by all generations of a process.

One row takes the head about as long as sixteen, because reading its weights is what takes the time (docs/log.md). So
rows that arrive together are scored together, whoever they belong to. What each generation makes of its scores is done
on the same visit to the thread.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llmasos.blocks.ends import ModelEnds
from llmasos.blocks.tensors import to_torch
from llmasos.wire import Tensor

T = TypeVar("T")

MAX_ROWS = 64
"""Rows scored at once: with 150,000 tokens in a vocabulary they take 40 MB."""
GATHER_S = 0.001
"""How long the head waits for the next rows to join those that wait: a fifth of what it takes for one row."""


@dataclass(slots=True)
class _Waiting:
    rows: Tensor
    then: Callable[[torch.Tensor], Any]
    answer: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


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

    async def score(self, rows: Tensor, then: Callable[[torch.Tensor], T]) -> T:
        """What `then` makes on the thread of the scores of `rows`, (rows, vocab), float32. At most MAX_ROWS at once."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(rows, then, answer))
        if self._rounds is None:
            self._rounds = asyncio.create_task(self._serve(), name="head")
        return await answer

    async def _serve(self) -> None:
        """Score until nobody waits. What goes wrong is told to those it concerns."""
        batch: list[_Waiting] = []
        try:
            while self._waiting:
                await self._gather()
                batch = self._take()
                self.calls += 1
                await asyncio.get_running_loop().run_in_executor(self._thread, self._score, batch)
                for waiting in batch:
                    if waiting.answer.done():
                        continue  # its generation has been cancelled
                    if waiting.error is not None:
                        waiting.answer.set_exception(waiting.error)
                    else:
                        waiting.answer.set_result(waiting.result)
        except Exception as error:  # noqa: BLE001 - the thread is gone: whoever waits is told, and raises it
            batch, self._waiting = [*batch, *self._waiting], []
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
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
        while count < len(self._waiting) and (not count or rows + self._waiting[count].rows.tokens <= MAX_ROWS):
            rows += self._waiting[count].rows.tokens
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _score(self, batch: Sequence[_Waiting]) -> None:
        """On the thread."""
        try:
            logits = self._ends.logits(torch.cat([to_torch(waiting.rows) for waiting in batch]))
        except Exception as error:  # noqa: BLE001 - whoever waits is told, and raises it
            for waiting in batch:
                waiting.error = error
            return
        first = 0
        for waiting in batch:
            end = first + waiting.rows.tokens
            try:
                waiting.result = waiting.then(logits[first:end])
            except Exception as error:  # noqa: BLE001 - the same
                waiting.error = error
            first = end
