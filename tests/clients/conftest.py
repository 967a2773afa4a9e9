"""What people use, in front of what they would run: clients as their makers ship them, a swarm of processes.

One swarm and two gateways serve all tests here (`tests/conftest.py` keeps them on one worker): each process that starts
costs seconds of processor time.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.local import LocalSwarm
from tests.commands import LLMASOS, command, share_a_swarm

HOSTILE = "<img src=x onerror=\"document.title='HACKED'\">"
PEERS = {"a": "0:15", "b": "15:30", HOSTILE: "0:30"}
"""Two routes; one peer would like to be markup."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    share_a_swarm(items, Path(__file__).parent, "session")


@dataclass(frozen=True)
class Running:
    """A swarm of two routes and its gateway."""

    swarm: LocalSwarm
    url: str

    async def activity(self) -> dict[str, Any]:
        """What the gateway says that goes on."""
        async with AsyncLLMasOS(self.url) as watcher:
            assert watcher._gateway is not None
            return await watcher._gateway._json("GET", "/api/activity")

    async def kill_one_in_use(self) -> str:
        """Kill the first hop of the only text that is being written; the name of the peer."""
        (live,) = (await self.activity())["running"]
        peer = next(peer for peer in self.swarm.peers.values() if peer.peer_id == live["route"][0]["peer"])
        await self.swarm.kill(peer.name)
        return peer.name

    async def heal(self) -> None:
        """Start the peers that are not there."""
        missing = {name: blocks for name, blocks in PEERS.items() if name not in self.swarm.peers}
        await asyncio.gather(*(self.swarm.start_peer(name, blocks) for name, blocks in missing.items()))


@dataclass(frozen=True)
class Guarded:
    """A gateway that wants a key, and the key, which may have one request at a time."""

    url: str
    secret: str
    file: Path


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
            url = (await process.stdout.readline()).decode().strip()
        yield url
    finally:
        process.terminate()
        assert await process.wait() == 0


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running() -> AsyncIterator[Running]:
    """Started once: whoever needs all of its peers starts those again that others have killed."""
    async with LocalSwarm() as swarm:
        await Running(swarm, "").heal()
        async with gateway(swarm) as url:
            yield Running(swarm, url)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def guarded(running: Running, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    """Started once as well."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    made = await command("llmasos", "key", "alice", "--file", str(file), "--concurrent", "1")
    assert made.code == 0, made.stderr
    async with gateway(running.swarm, "--api-key-file", str(file)) as url:
        yield Guarded(url, made.stdout.strip(), file)
