"""Tasks that have an owner: none is forgotten, none outlives it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class TaskSet:
    """The background tasks of one object, which awaits `close` before it ends.

    A task that fails is logged at once: one line, and the traceback at debug level.
    """

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], None] = {}  # a dict, not a set: cancelled in the order of their start

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start `work`; `name` says in logs what it is."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("%s failed: %s: %s", task.get_name(), type(error).__name__, error)
            logger.debug("%s failed", task.get_name(), exc_info=error)

    def cancel(self) -> list[asyncio.Task[None]]:
        """Ask every task to end, except the one that asks, and list them."""
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        return tasks

    async def close(self) -> None:
        """Cancel every task and wait until all have ended; the task that calls this is left alone."""
        while tasks := self.cancel():
            await asyncio.wait(tasks)

    async def finish(self) -> None:
        """Wait until every task has ended by itself."""
        while tasks := [task for task in self._tasks if task is not asyncio.current_task()]:
            await asyncio.wait(tasks)
