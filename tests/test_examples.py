"""The examples and the commands of the README, as a user runs them: processes against a swarm of real processes."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from sim.local import LocalProcess, LocalSwarm

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120.0


class Done(NamedTuple):
    """How a process ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str


async def run(*arguments: str, stdin: str = "") -> Done:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await process.communicate(stdin.encode())
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


async def test_generate_as_one_object(peer: LocalProcess) -> None:
    arguments = ["-", "--json", "--max-new-tokens", "5", "--join", peer.address]
    done = await run("-m", "llmasos.cli", "generate", *arguments, stdin="The world is")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {
        "text",
        "token_ids",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "route",
        "time_to_first_token_s",
        "tokens_per_s",
        "failovers",
    }
    assert (result["prompt_tokens"], result["completion_tokens"], len(result["token_ids"])) == (3, 5, 5)
    assert result["route"] == [{"peer": peer.peer_id, "blocks": "0:30"}]
    assert (result["finish_reason"], result["failovers"]) == ("length", 0)


async def test_the_readme_s_status(peer: LocalProcess) -> None:
    done = await run("-m", "llmasos.cli", "status", "--json", "--join", peer.address)
    assert done.code == 0, done.stderr
    [model] = json.loads(done.stdout)["models"]
    assert (model["model"], model["blocks"], model["covered"], model["missing"]) == ("smollm2", 30, True, [])
    [shown] = [entry for entry in model["peers"] if entry["peer"] == peer.peer_id]
    assert set(shown) == {
        "peer",
        "name",
        "blocks",
        "state",
        "throughput",
        "load",
        "kv_free_tokens",
        "dtype",
        "quantization",
        "version",
        "age_s",
    }
    assert (shown["name"], shown["blocks"], shown["state"]) == ("whole", "0:30", "online")
    table = await run("-m", "llmasos.cli", "status", "--join", peer.address)
    assert (table.code, table.stdout) == (0, "")
    assert "smollm2 is usable" in table.stderr
    assert peer.peer_id[-8:] in table.stderr


async def test_another_model_is_not_there(peer: LocalProcess) -> None:
    arguments = ["generate", "Hello", "--model", "no-such-model.gguf", "--join", peer.address]
    done = await run("-m", "llmasos.cli", *arguments)
    assert (done.code, done.stdout) == (1, "")
    assert "no-such-model.gguf" in done.stderr
    assert "Traceback" not in done.stderr
