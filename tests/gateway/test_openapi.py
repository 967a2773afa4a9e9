"""The document at /openapi.json: it says what there is, and a tool that tries everything in it breaks nothing."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.gateway.conftest import Served

SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


async def test_it_names_every_path_and_no_other(tiny_gateway: Served) -> None:
    document = await (await tiny_gateway.http.get("/openapi.json")).json()
    described = {(path, method.upper()) for path, found in document["paths"].items() for method in found}
    routes = tiny_gateway.http.server.app.router.routes()
    served = {(str(route.resource and route.resource.canonical), route.method) for route in routes}
    own = {(path, method) for path, method in served if not path.startswith("/web/") and method != "HEAD"}
    assert described == own


async def test_it_names_the_models_that_can_be_used(tiny_gateway: Served) -> None:
    document = await (await tiny_gateway.http.get("/openapi.json")).json()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["model"]["enum"] == ["tiny"]


async def test_it_names_the_headers(tiny_gateway: Served) -> None:
    document = await (await tiny_gateway.http.get("/openapi.json")).json()
    for path, found in document["paths"].items():
        for operation in found.values():
            asked = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "header"}
            traced = {"x-llmasos-trace"} if path.endswith("/completions") else set()
            assert asked == {"x-request-id"} | traced
            assert "x-request-id" in operation["responses"]["200"]["headers"]
    refusals = document["components"]["responses"]
    assert all("x-request-id" in refusal["headers"] for refusal in refusals.values())
    assert [status for status in refusals if "Retry-After" in refusals[status]["headers"]] == ["429", "503"]


@pytest.mark.swarm  # it starts a process
@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not installed: make clients")
async def test_whatever_is_sent_the_gateway_does_not_fail(listening: str, tmp_path: Path) -> None:
    """Requests that the document allows, and such that it does not; the answers are of the forms that it tells."""
    process = await asyncio.create_subprocess_exec(
        *(str(SCHEMATHESIS), "run", f"{listening}/openapi.json", "--checks", f"{CHECKS},unsupported_method"),
        *("--phases", "coverage,fuzzing", "--max-examples", "10", "--seed", "3", "--no-shrink", "--warnings", "off"),
        *("--suppress-health-check", "all", "--request-timeout", "60", "--no-color"),
        cwd=tmp_path,
        env={**os.environ, "NO_PROXY": "*"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    assert "Tested: 12" in said.decode()  # all but the document itself
