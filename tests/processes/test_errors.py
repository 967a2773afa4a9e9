"""Wrong input at the command line: one clear error, the next command, the right exit code, no traceback."""

import json
from pathlib import Path

import pytest

from sim.local import LocalSwarm
from tests.processes.conftest import command

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWNvSZnPi3RrhrTwEY4LuuBeB6K6facKUCJcyWG1aoDd2p"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--blocks", "12"], 2, ["START:END"]),
        (["--blocks", "5:5"], 2, ["half-open"]),
        (["--blocks", "20:31"], 2, ["0:30", "20:31"]),
        (["--blocks", "0:3", "--port", "70000"], 2, ["port"]),
        (["--blocks", "0:3", "--model", "no-such-model"], 1, ["no-such-model"]),
        (["--blocks", "0:3", "--model", "/nowhere/model.gguf"], 1, ["/nowhere/model.gguf"]),
        (["--blocks", "0:3", "--device", "quantum"], 2, ["quantum"]),
        (["--blocks", "0:3", "--join", "not-an-address"], 2, ["not-an-address", "/p2p/"]),
        (["--blocks", "0:3", "--join", NOBODY], 1, ["127.0.0.1/tcp/9"]),
        (["--blocks", "0:3", "--engine", "torch", "--quantize", "int4"], 2, ["int4", "torch"]),
        ([], 2, ["--blocks"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
async def test_a_peer_that_cannot_start(arguments: list[str], code: int, words: list[str]) -> None:
    done = await command("-m", "llmasos.peer", *arguments)
    assert done.code == code, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "Hello", "--join", "nonsense"], 2, ["nonsense"]),
        (["generate", "Hello", "--join", NOBODY], 1, ["127.0.0.1/tcp/9"]),
        (["generate", "Hello"], 2, ["--join"]),
        (["generate", "Hello", "--join", NOBODY, "--max-new-tokens", "0"], 2, ["max-new-tokens"]),
        (["status", "--join", NOBODY], 1, ["127.0.0.1/tcp/9"]),
        (["dance"], 2, ["dance"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
async def test_a_client_that_cannot_start(arguments: list[str], code: int, words: list[str]) -> None:
    done = await command("llmasos", *arguments)
    assert done.code == code, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


async def test_requests_that_a_swarm_cannot_answer(swarm: LocalSwarm, tmp_path: Path) -> None:
    nothing = await command("llmasos", "generate", "Hello", "--join", swarm.address)
    assert (nothing.code, "0:30" in nothing.stderr) == (1, True)
    assert json.loads((await command("llmasos", "status", "--join", swarm.address, "--json")).stdout) == {"models": []}
    await swarm.start_peer("left", "0:12")
    await swarm.start_peer("right", "20:30")
    gap = await command("llmasos", "generate", "Hello", "--join", swarm.address)
    assert (gap.code, "12:20" in gap.stderr) == (1, True)
    long = await command("llmasos", "generate", "-", "--join", swarm.address, stdin=b"word " * 9_000)
    assert (long.code, "context" in long.stderr) == (2, True)
    for stdin in (b"", b"\xff\xfe\xfa"):
        refused = await command("llmasos", "generate", "-", "--join", swarm.address, stdin=stdin)
        assert refused.code == 2
        assert "Traceback" not in refused.stderr
    argument = await command("llmasos", "generate", b"\xff\xfe", "--join", swarm.address)
    assert (argument.code, "Traceback" in argument.stderr) == (2, False)
