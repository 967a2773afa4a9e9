"""What a gateway prints when it is ready can be typed as it stands, but for the key."""

import shlex
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmasos.blocks.registry import ModelSpec
from llmasos.cli_serve import _say_ready, _to_try
from llmasos.client.gateway import serve as listen
from llmasos.client.gateway_keys import new_key
from llmasos.config import ClientConfig, GatewayConfig
from tests.gateway.conftest import Served, folder_of


def curl(told: str) -> tuple[str, dict[str, str], str]:
    """The address, headers and body of the curl command in what was told."""
    lines = told[told.index("curl http") :].partition("  join ")[0]
    _, url, *options = shlex.split(lines.replace("\\\n", " "))
    given = list(zip(options[::2], options[1::2], strict=True))
    headers = dict(value.split(": ", 1) for option, value in given if option == "-H")
    (body,) = [value for option, value in given if option == "-d"]
    return url, headers, body


@pytest.mark.parametrize("keys", [False, True], ids=["open", "with keys"])
async def test_the_curl_line_is_answered(
    keys: bool, tiny: ModelSpec, tiny_gateway: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret, lines = new_key("alice")
    file = tmp_path / "keys.toml"
    file.write_text(lines)
    config = GatewayConfig(port=0, models=(folder_of(tiny),), api_key_file=file if keys else None)
    runner = await listen(tiny_gateway.client, config, ClientConfig())
    try:
        host, port = runner.addresses[0][:2]
        model = await _to_try(tiny_gateway.client, config, ClientConfig())
        _say_ready(f"http://{host}:{port}", "ADDRESS", config, model)
        url, headers, body = curl(capsys.readouterr().err)
        assert ("Authorization" in headers) is keys
        headers = {name: value.replace("…", secret) for name, value in headers.items()}
        async with aiohttp.ClientSession() as http, http.post(url, headers=headers, data=body) as answer:
            found: dict[str, Any] = await answer.json()
            assert (answer.status, found["model"]) == (200, tiny.name), found
    finally:
        await runner.cleanup()


async def test_without_a_model_of_its_own_it_is_one_that_is_served(tiny: ModelSpec, tiny_gateway: Served) -> None:
    assert await _to_try(tiny_gateway.client, GatewayConfig(), ClientConfig()) == tiny.name
    assert await _to_try(tiny_gateway.client, GatewayConfig(), ClientConfig(quantization="int8")) == "smollm2"


async def test_a_model_that_it_was_told_of_is_named_before_it_is_served(tiny: ModelSpec, tiny_gateway: Served) -> None:
    config = GatewayConfig(models=(folder_of(tiny),))
    assert await _to_try(tiny_gateway.client, config, ClientConfig(dtype="bfloat16")) == tiny.name
