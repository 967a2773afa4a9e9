"""The examples, as a user runs them: each a process, against a swarm of real processes."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from llmasos.local import LocalProcess, LocalSwarm

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120.0


class Done(NamedTuple):
    """How a process ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str


async def run(*arguments: str) -> Done:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Done(process.returncode, stdout.decode(), stderr.decode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def peer() -> AsyncIterator[LocalProcess]:
    """A peer with all blocks, joined to a bootstrap."""
    async with LocalSwarm() as swarm:
        yield await swarm.start_peer("whole", "0:30")


async def test_generate_as_a_program_and_as_a_command(peer: LocalProcess) -> None:
    arguments = ["generate", "The world is", "--join", peer.address, "--max-new-tokens", "8"]
    program, command = await asyncio.gather(
        run("examples/generate.py", peer.address), run("-m", "llmasos.cli", *arguments)
    )
    assert program.code == 0, program.stderr
    assert program.stderr == f"blocks 0:30 ran on {peer.peer_id}\n"
    assert command.code == 0, command.stderr
    assert command.stdout.strip()
    assert program.stdout.startswith(f"The world is{command.stdout.rstrip()}")  # the completion, and nothing else
    assert "tokens/s, route 0:30 on" in command.stderr


async def test_stream(peer: LocalProcess) -> None:
    first, second = await asyncio.gather(*(run("examples/stream.py", peer.address) for _ in range(2)))
    assert first.code == 0, first.stderr
    assert first.stdout == second.stdout  # it has a seed
    assert first.stdout.count(".") == 1
    assert first.stdout.endswith(".\n")


async def test_batch(peer: LocalProcess) -> None:
    done = await run("examples/batch.py", peer.address)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("The capital of France is|")
    assert "Paris" in lines[0]
    assert "tokens in" in done.stderr


async def test_own_peer() -> None:
    done = await run("examples/own_peer.py")
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("The world is")
    assert "serving 0:30 at /ip4/127.0.0.1/tcp/" in done.stderr


async def test_own_peer_in_a_swarm(peer: LocalProcess) -> None:
    done = await run("examples/own_peer.py", "10:20", peer.address)
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("The world is")
