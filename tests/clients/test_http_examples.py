"""The examples for HTTP, as a user runs them."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from tests.clients.conftest import Running
from tests.commands import command

ROOT = Path(__file__).parents[2]


async def test_openai_client(running: Running) -> None:
    done = await command("examples/openai_client.py", running.url, cwd=ROOT)
    assert done.code == 0, done.stderr
    said, _, city = done.stdout.strip().rpartition("\n")
    assert "Paris" in said
    assert "'capital': " in city


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl(running: Running) -> None:
    process = await asyncio.create_subprocess_exec(
        "examples/http.sh", running.url, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    stdout, _ = await process.communicate()
    assert process.returncode == 0
    models, *events, tokens, scored = [line for line in stdout.decode().splitlines() if line]
    assert json.loads(models)["data"][0]["id"] == "smollm2"
    assert events[-1] == "data: [DONE]"
    scores = json.loads(scored)["choices"][0]["logprobs"]
    assert len(scores["token_logprobs"]) == json.loads(tokens)["count"] + 1
    assert scores["token_logprobs"][-1] > -2  # Paris
