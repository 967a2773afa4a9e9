"""Real processes on this machine: the promises made to users."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sim.local import LocalSwarm
from tests.commands import LLMASOS, Finished, command, share_a_swarm

__all__ = ["LLMASOS", "Finished", "command"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    share_a_swarm(items, Path(__file__).parent, "module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """A bootstrap and nothing else; each module starts the peers it needs."""
    async with LocalSwarm() as started:
        yield started
