"""Real processes on this machine: the promises made to users."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from sim.local import LocalSwarm

LLMASOS = str(Path(sys.executable).parent / "llmasos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts processes, and shares the module's event loop with the swarm it runs on."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.swarm)
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


@dataclass(frozen=True)
class Finished:
    """What a command printed and how it ended."""

    code: int
    stdout: str
    stderr: str


async def command(*arguments: str | bytes, stdin: bytes = b"", timeout_s: float = 120) -> Finished:
    """Run a command to its end. `llmasos` is the installed one; anything else is given to this Python."""
    program = [LLMASOS, *arguments[1:]] if arguments[0] == "llmasos" else [sys.executable, *arguments]
    process = await asyncio.create_subprocess_exec(
        *program,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate(stdin)
    except TimeoutError:
        process.kill()
        stdout, stderr = await process.communicate()
        pytest.fail(f"{arguments} did not end in {timeout_s} s\n{stdout.decode()}\n{stderr.decode()}")
    assert process.returncode is not None
    return Finished(process.returncode, stdout.decode(), stderr.decode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """A bootstrap and nothing else; each module starts the peers it needs."""
    async with LocalSwarm() as started:
        yield started
