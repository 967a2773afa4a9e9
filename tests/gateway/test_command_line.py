"""`llmasos generate`, `status` and `models` in front of a gateway: what they show, send and refuse."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from llmasos.blocks.registry import ModelSpec
from llmasos.client.gateway_keys import new_key
from tests.commands import llmasos_here
from tests.gateway.conftest import Served, folder_of, serve

WRITE = ("generate", "ab", "--model", "tiny", "--max-new-tokens", "3", "--json")


def address(served: Served) -> str:
    return str(served.http.make_url("/"))


@pytest_asyncio.fixture
async def guarded(tiny: ModelSpec, tmp_path: Path) -> AsyncIterator[tuple[str, str]]:
    """The address of a gateway that wants a key, and the key."""
    secret, entry = new_key("alice")
    file = tmp_path / "keys.toml"
    file.write_text(entry)
    async with serve(tiny, source=folder_of(tiny), api_key_file=file) as served:
        yield address(served), secret


async def test_nothing_is_loaded_to_ask_a_gateway(tiny_gateway: Served) -> None:
    url = address(tiny_gateway)
    written = await llmasos_here(*WRITE, "--join", url)
    assert written.code == 0, written.stderr
    assert json.loads(written.stdout)["completion_tokens"] == 3
    assert f"asking the gateway {url}" in written.stderr
    assert "loading" not in written.stderr


@pytest.mark.parametrize("arguments", [WRITE, ("status", "--json"), ("models", "--json")], ids=" ".join)
async def test_a_gateway_with_keys(
    arguments: tuple[str, ...], guarded: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, secret = guarded
    without = await llmasos_here(*arguments, "--join", url)
    assert (without.code, without.stdout) == (2, "")
    assert "no API key was sent" in without.stderr
    assert "--api-key KEY" in without.stderr
    assert "LLMASOS_API_KEY" in without.stderr
    assert "LLMasOS(" not in without.stderr
    given = await llmasos_here(*arguments, "--join", url, "--api-key", secret)
    assert given.code == 0, given.stderr
    assert "tiny" in given.stdout or "text" in given.stdout
    monkeypatch.setenv("LLMASOS_API_KEY", secret)
    assert (await llmasos_here(*arguments, "--join", url)).code == 0
    wrong = await llmasos_here(*arguments, "--join", url, "--api-key", "sk-wrong")
    assert "that key is not known" in wrong.stderr
    assert secret not in given.stdout + given.stderr + wrong.stderr


async def test_a_gateway_that_is_not_there_in_plain_words() -> None:
    done = await llmasos_here("status", "--join", "http://127.0.0.1:1")
    first, hint = done.stderr.splitlines()
    assert (done.code, done.stdout) == (1, "")
    assert first == "the gateway http://127.0.0.1:1 does not answer: Connection refused"
    assert "is it running?" in hint
