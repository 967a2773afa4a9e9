"""What the gateway refuses over HTTP, and that it says so in one form: requests, hosts, origins, what is no HTTP."""

import asyncio
import json
from io import BytesIO
from typing import Any

import pytest
from yarl import URL

from llmasos.blocks.registry import ModelSpec
from tests.gateway.conftest import CHAT, COMPLETIONS, GO_ON, HELLO, Served, error_of, folder_of, serve


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({**HELLO, "model": "huge"}, 404, "model"),
        ({**HELLO, "model": "/etc"}, 404, "model"),
        ({**HELLO, "max_tokens": 250}, 400, "max_tokens"),
        ({**HELLO, "messages": [{"role": "user", "content": 300 * "a"}]}, 400, "messages"),
        ({**HELLO, "logit_bias": {"259": 1}}, 400, "logit_bias"),
        ({**HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({**HELLO, "best_of": 2}, 400, "best_of"),
    ],
    ids=str,
)
async def test_wrong_requests(body: dict[str, Any], status: int, param: str, tiny_gateway: Served) -> None:
    for stream in (False, True):
        found, answer = await tiny_gateway.post(CHAT, {**body, "stream": stream})
        assert (found, error_of(answer)["param"]) == (status, param)
        assert error_of(answer)["type"] == "invalid_request_error"


async def test_a_prompt_outside_the_vocabulary(tiny_gateway: Served) -> None:
    status, answer = await tiny_gateway.post(COMPLETIONS, {**GO_ON, "prompt": [5, 259]})
    assert (status, error_of(answer)["param"]) == (400, "prompt")


async def test_errors_of_http_itself_are_json(tiny_gateway: Served) -> None:
    http = tiny_gateway.http
    cases = [
        (await http.get("/nowhere"), 404),
        (await http.get(CHAT), 405),
        (await http.post("/v1/models"), 405),
        (await http.post(CHAT, data=b"{", headers={"Content-Type": "application/json"}), 400),
        (await http.post(CHAT, data=b"{}", headers={"Content-Type": "text/plain"}), 415),
        (await http.post(CHAT, data=BytesIO(b" " * (5 * 2**20)), headers={"Content-Type": "application/json"}), 413),
        (await http.get("/web/..%2fgateway.py"), 404),
        (await http.get("/health", headers={"Host": "evil.example"}), 403),
    ]
    for answer, status in cases:
        assert answer.status == status
        assert answer.content_type == "application/json"
        assert answer.headers["x-request-id"].startswith("req_")
        error_of(await answer.json())
    assert (await http.post("/v1/models")).headers["Allow"] == "GET,HEAD"
    named = await http.get("/health", headers={"x-request-id": "mine-7"})
    assert named.headers["x-request-id"] == "mine-7"
    assert "Access-Control-Allow-Origin" not in named.headers


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 9_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer SECRET\x01\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
         b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nExpect: a-miracle\r\n\r\n", 417),
        (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nExpect: a-miracle\r\n\r\n", 417),
    ],
    ids=["header", "line", "key", "tls", "gzip", "expect", "expect nowhere"],
)  # fmt: skip
async def test_what_is_no_request_is_refused_as_json(
    raw: bytes, status: int, listening: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = URL(listening)
    assert url.host is not None
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(raw + b"GET")  # what comes behind it is not read
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r")[0])
    error_of(json.loads(await reader.readexactly(length)))
    assert int(head.split()[1]) == status
    assert "content-type: application/json" in head
    assert "x-request-id: req_" in head
    assert "SECRET" not in caplog.text
    writer.close()
    await writer.wait_closed()


async def test_who_waits_for_leave_to_send_a_body_gets_it(listening: str) -> None:
    url = URL(listening)
    assert url.host is not None
    reader, writer = await asyncio.open_connection(url.host, url.port)
    body = b'{"prompt": "ab"}'
    head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\nExpect: 100-Continue\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    writer.write(body)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()


async def test_other_origins_only_when_asked(tiny: ModelSpec) -> None:
    async with serve(tiny, source=folder_of(tiny), cors_origins=("https://mine.example",)) as served:
        asked = await served.http.options(CHAT, headers={"Origin": "https://mine.example"})
        assert (asked.status, asked.headers["Access-Control-Allow-Origin"]) == (204, "https://mine.example")
        stranger = await served.http.get("/health", headers={"Origin": "https://other.example"})
        assert "Access-Control-Allow-Origin" not in stranger.headers
