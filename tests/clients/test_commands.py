"""llmasos up, chat, doctor, models and key, as somebody types them."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.gateway_keys import load_keys
from tests.clients.conftest import LLMASOS, Running, gateway


async def typed(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        LLMASOS,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


async def test_a_chat_goes_on_from_what_was_said(running: Running) -> None:
    said = "My name is Ada. What is the capital of France?\n/route\n/dance\nAnd what is my name?\n"
    options = ["--join", running.swarm.address, "--temperature", "0", "--max-new-tokens", "40"]
    code, stdout, stderr = await typed("chat", *options, stdin=said)
    assert code == 0, stderr
    assert "Paris" in stdout
    assert "0:15 on" in stderr
    assert "/dance is no command" in stderr


async def test_the_doctor_finds_a_healthy_swarm(running: Running) -> None:
    code, stdout, stderr = await typed("doctor", "--join", running.swarm.address, "--json")
    report = json.loads(stdout)
    assert (code, report["ok"]) == (0, True), stderr
    assert {"python", "packages", "memory", "disk", "device", "model", "coverage", "clock"} <= {
        finding["check"] for finding in report["findings"]
    }


async def test_the_doctor_says_what_to_do(running: Running) -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWPk51brrtu3iCxm9Q5MUSArhMDM6ZsuF3ifu92U5HNJna"
    code, stdout, stderr = await typed("doctor", "--model", "no-such-model", "--join", nobody)
    assert (code, stdout) == (1, "")
    assert "FAIL  model" in stderr
    assert "FAIL  bootstrap" in stderr
    assert "Traceback" not in stderr


async def test_models(running: Running) -> None:
    code, stdout, _ = await typed("models", "--join", running.swarm.address)
    assert (code, stdout) == (0, "smollm2\n")


async def test_a_key_opens_the_gateway(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    code, stdout, _ = await typed("key", "alice", "--file", str(file), "--concurrent", "2")
    secret = stdout.strip()
    assert code == 0
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o77 == 0
    key = load_keys(file).find(secret)
    assert key is not None
    assert key.concurrent == 2
    again, _, stderr = await typed("key", "alice", "--file", str(file))
    assert again == 2
    assert "two keys" in stderr
    assert load_keys(file).find(secret) is not None
    async with gateway(running.swarm, "--api-key-file", str(file)) as url, AsyncLLMasOS(url, api_key=secret) as client:
        assert await client.models() == ["smollm2"]


async def test_up_is_all_in_one_command() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llmasos.cli", "up", "--peers", "2", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    async with AsyncLLMasOS(url) as client:
        result = await client.generate("The world is", max_new_tokens=5)
    assert [hop.blocks for hop in result.route] == ["0:15", "15:30"]
    os.kill(process.pid, signal.SIGINT)
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert b"Traceback" not in stderr
