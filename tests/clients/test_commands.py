"""llmasos up, chat, doctor, models and key, as somebody types them."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.gateway_keys import load_keys
from tests.clients.conftest import Guarded, Running
from tests.commands import command, llmasos_here


async def test_a_chat_goes_on_from_what_was_said(running: Running) -> None:
    said = "My name is Ada. What is the capital of France?\n/route\n/dance\nAnd what is my name?\n"
    options = ["--join", running.swarm.address, "--temperature", "0", "--max-new-tokens", "40"]
    chat = await command("llmasos", "chat", *options, stdin=said.encode())
    assert chat.code == 0, chat.stderr
    assert "Paris" in chat.stdout
    assert "0:30 on" in chat.stderr or "0:15 on" in chat.stderr
    assert "/dance is no command" in chat.stderr


async def test_the_doctor_finds_a_healthy_swarm(running: Running) -> None:
    doctor = await llmasos_here("doctor", "--join", running.swarm.address, "--json")
    report = json.loads(doctor.stdout)
    assert (doctor.code, report["ok"]) == (0, True), doctor.stderr
    assert {"python", "packages", "memory", "disk", "device", "model", "coverage", "clock"} <= {
        finding["check"] for finding in report["findings"]
    }


async def test_the_doctor_says_what_to_do(tmp_path: Path) -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWPk51brrtu3iCxm9Q5MUSArhMDM6ZsuF3ifu92U5HNJna"
    doctor = await llmasos_here("doctor", "--model", str(tmp_path), "--join", nobody)
    assert (doctor.code, doctor.stdout) == (1, "")
    assert "FAIL  model" in doctor.stderr
    assert "FAIL  bootstrap" in doctor.stderr


async def test_models(running: Running) -> None:
    models = await llmasos_here("models", "--join", running.swarm.address)
    assert (models.code, models.stdout) == (0, "smollm2\n")


async def test_a_gateway_is_asked_as_well(running: Running) -> None:
    status = await llmasos_here("status", "--json", "--join", running.url)
    assert status.code == 0, status.stderr
    assert [model["model"] for model in json.loads(status.stdout)["models"]] == ["smollm2"]
    written = await llmasos_here("generate", "The world is", "--max-new-tokens", "3", "--join", running.url)
    assert (written.code, written.stdout) == (0, " a complex tapestry\n")


async def test_a_key_opens_the_gateway(guarded: Guarded) -> None:
    assert guarded.secret not in guarded.file.read_text()
    assert guarded.file.stat().st_mode & 0o77 == 0
    key = load_keys(guarded.file).find(guarded.secret)
    assert key is not None
    assert key.concurrent == 1
    again = await command("llmasos", "key", "alice", "--file", str(guarded.file))
    assert again.code == 2
    assert "two keys" in again.stderr
    assert load_keys(guarded.file).find(guarded.secret) is not None
    async with AsyncLLMasOS(guarded.url, api_key=guarded.secret) as client:
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
