"""The commands that a peer prints when it is ready do what they say, typed as they are."""

import asyncio
import shlex
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llmasos.blocks.registry import ALIASES, embedded
from sim.local import LocalProcess, LocalSwarm
from tests.commands import command, llmasos_here


@asynccontextmanager
async def peer_of(model: str, blocks: str, options: Sequence[str]) -> AsyncIterator[tuple[LocalSwarm, LocalProcess]]:
    """A swarm of one peer."""
    async with LocalSwarm(model=model) as swarm:
        yield swarm, await swarm.start_peer("peer", blocks, *options)


async def printed(peer: LocalProcess, beginning: str) -> list[str]:
    """The command with that beginning among the lines of a peer, as a shell would split it."""
    async with asyncio.timeout(20):
        while not any("stop     Ctrl-C" in line for line in peer.stderr):  # noqa: ASYNC110 - its stderr is read beside
            await asyncio.sleep(0.05)
    (line,) = [line for line in peer.stderr if beginning in line]
    return shlex.split(line[line.index(beginning) :])


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    """The embedded model by a path, with a name that a shell would split."""
    file = embedded(ALIASES["smollm2"])
    assert file is not None, "the tests need the embedded model"
    path = tmp_path / "a model.gguf"
    path.symlink_to(file)
    return str(path)


@pytest.mark.parametrize("options", [("--quantize", "int8"), ("--dtype", "bfloat16")], ids=" ".join)
async def test_a_whole_peer_says_how_to_use_it(options: tuple[str, ...], gguf: str) -> None:
    async with peer_of(gguf, "0:30", options) as (_, peer):
        typed = await printed(peer, "llmasos generate")
        done = await command(*typed, "--max-new-tokens", "3")
        assert done.code == 0, done.stderr
        assert done.stdout.strip()


async def test_a_part_says_how_to_complete_it(gguf: str) -> None:
    async with peer_of(gguf, "0:12", ("--quantize", "int8", "--dtype", "bfloat16")) as (swarm, peer):
        _, *arguments = await printed(peer, "python -m llmasos.peer")
        parsed = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        assert parsed["--blocks"] == "12:30"
        doctor = await llmasos_here("doctor", "--model", gguf, "--join", peer.address)
        assert shlex.join(["python", *arguments]) in doctor.stderr
        other = await swarm.start_peer("other", "12:30", *arguments[2:])
        typed = await printed(other, "llmasos generate")
        done = await command(*typed, "--max-new-tokens", "3")
        assert done.code == 0, done.stderr


async def test_peers_in_other_numbers_do_not_complete_it() -> None:
    async with peer_of("smollm2", "0:30", ()) as (swarm, _):
        half = await swarm.start_peer("half", "0:12", "--dtype", "bfloat16")
        typed = await printed(half, "python -m llmasos.peer")
        assert typed[3:9] == ["--blocks", "12:30", "--model", "smollm2", "--dtype", "bfloat16"]
        assert any("blocks 12:30 have no peer in bfloat16 yet" in line for line in half.stderr)
