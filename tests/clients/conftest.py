"""What people use, in front of what they would run: clients as their makers ship them, a swarm of processes."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from llmasos.local import LocalProcess, LocalSwarm

PEERS = {"a": "0:15", "b": "15:30", "c": "0:15", "<img src=x onerror=\"document.title='HACKED'\">": "15:30"}
"""Two routes; one peer would like to be markup."""
LLMASOS = str(Path(sys.executable).parent / "llmasos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts processes, and shares one event loop with the swarm it runs on."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.swarm)
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@dataclass(frozen=True)
class Running:
    """A swarm of two routes and its gateway."""

    swarm: LocalSwarm
    url: str


@asynccontextmanager
async def gateway(swarm: LocalSwarm, *options: str) -> AsyncIterator[str]:
    """`llmasos gateway` as a process; its address."""
    process = await asyncio.create_subprocess_exec(
        LLMASOS,
        *("gateway", "--join", swarm.address, "--port", "0", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(90):
            yield (await process.stdout.readline()).decode().strip()
    finally:
        process.terminate()
        assert await process.wait() == 0


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running() -> AsyncIterator[Running]:
    """Started once: whoever kills a peer of it starts it again."""
    async with LocalSwarm() as swarm:
        await heal(swarm)
        async with gateway(swarm) as url:
            yield Running(swarm, url)


async def heal(swarm: LocalSwarm) -> None:
    """Start the peers that are not there."""
    missing = {name: blocks for name, blocks in PEERS.items() if name not in swarm.peers}
    await asyncio.gather(*(swarm.start_peer(name, blocks) for name, blocks in missing.items()))


def peer_named(swarm: LocalSwarm, peer_id: str) -> LocalProcess:
    """The process of a peer of a route."""
    return next(peer for peer in swarm.peers.values() if peer.peer_id == peer_id)
