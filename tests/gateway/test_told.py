"""What the gateway tells beside its texts: traces, logs, metrics, the page."""

import json
import re
from typing import Any

import pytest

from llmasos.config import PREFIX_PAGE_TOKENS
from llmasos.logs import JsonFormatter
from tests.gateway.conftest import CHAT, COMPLETIONS, GO_ON, HELLO, SPANS, Served, error_of


async def test_the_trace_tells_the_route(tiny_gateway: Served) -> None:
    answer = await tiny_gateway.http.post(CHAT, json=HELLO, headers={"x-llmasos-trace": "1"})
    (text,) = (await answer.json())["llmasos"]["texts"]
    assert [hop["blocks"] for hop in text["route"]] == SPANS
    assert len(text["token_ids"]) == text["completion_tokens"]


def adds_up(trace: dict[str, Any]) -> None:
    told_ms = sum(hop[part] for hop in trace["hops"] for part in ("queue_ms", "compute_ms", "network_ms"))
    assert trace["total_ms"] == pytest.approx(told_ms)
    assert trace["total_ms"] == pytest.approx(sum(step["total_ms"] for step in trace["steps"]))
    assert all(hop["compute_ms"] > 0 for hop in trace["hops"])


async def test_the_trace_tells_where_the_time_went(tiny_gateway: Served) -> None:
    body = HELLO | {"n": 2, "seed": 3}
    answer = await tiny_gateway.http.post(CHAT, json=body, headers={"x-llmasos-trace": "1"})
    whole = await answer.json()
    assert len(whole["llmasos_trace"]) == 2
    for trace, text in zip(whole["llmasos_trace"], whole["llmasos"]["texts"], strict=True):
        adds_up(trace)
        assert [hop["blocks"] for hop in trace["hops"]] == SPANS
        assert sum(step["tokens"] for step in trace["steps"]) >= text["prompt_tokens"] + text["completion_tokens"] - 1
    stream = await tiny_gateway.stream(CHAT, HELLO, **{"x-llmasos-trace": "1"})
    (told,) = [chunk["llmasos_trace"] for chunk in stream.chunks if "llmasos_trace" in chunk]
    adds_up(told[0])
    plain = await tiny_gateway.http.post(CHAT, json=HELLO)
    assert not [name for name in await plain.json() if name.startswith("llmasos")]


async def test_a_trace_of_another_kind_is_refused_by_name(tiny_gateway: Served) -> None:
    status, answer = await tiny_gateway.post(CHAT, HELLO, **{"x-llmasos-trace": "everything"})
    assert (status, error_of(answer)["param"]) == (400, "x-llmasos-trace")
    status, answer = await tiny_gateway.post(CHAT, HELLO, **{"x-llmasos-trace": "0"})
    assert status == 200
    assert "llmasos" not in answer


@pytest.mark.parametrize("scored", [False, True])
async def test_what_was_cached_of_a_prompt_is_told_and_counted(scored: bool, tiny_gateway: Served) -> None:
    """Whole pages, once for each prompt however many choices it has. A prompt that is scored is computed anew."""
    prompt = "x" * (2 * PREFIX_PAGE_TOKENS + 5)
    body = {**GO_ON, "prompt": prompt, "n": 2} | ({"echo": True, "logprobs": 0} if scored else {})
    _, first = await tiny_gateway.post(COMPLETIONS, body)
    assert await tiny_gateway.kv_is_free()
    stream = await tiny_gateway.stream(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    found = 0 if scored else 2 * PREFIX_PAGE_TOKENS
    for usage, cached in ((first["usage"], 0), (stream.chunks[-1]["usage"], found)):
        assert usage["prompt_tokens"] >= len(prompt)
        assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
    page = await (await tiny_gateway.http.get("/metrics")).text()
    assert f'llmasos_cached_tokens_total{{model="tiny"}} {found}.0' in page


async def test_what_is_logged_says_of_which_request_and_session(
    tiny_gateway: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(JsonFormatter())
    caplog.set_level("DEBUG", "llmasos")
    for name in ("one", "two"):
        await tiny_gateway.post(CHAT, HELLO, **{"x-request-id": name})
    await tiny_gateway.kv_is_free()
    entries = [json.loads(line) for line in caplog.text.splitlines() if line.startswith("{")]
    answered = [entry["request"] for entry in entries if "is answered with 200" in entry["message"]]
    assert answered == ["one", "two"]
    routed = {entry["request"]: entry["session"] for entry in entries if "goes through" in entry["message"]}
    hops = [
        hop
        for entry in entries
        if "goes through" in entry["message"]
        for hop in re.findall(r"[\d:]+ on", entry["message"])
    ]
    assert hops == 2 * [f"{span} on" for span in SPANS]
    assert sorted(routed) == ["one", "two"]
    begun = [entry["session"] for entry in entries if " begins: " in entry["message"]]
    assert set(begun) == set(routed.values())
    assert [begun.count(session) for session in sorted(set(begun))] == [2, 2]  # two sessions, on two peers each


async def test_what_is_counted(tiny_gateway: Served) -> None:
    await tiny_gateway.post(CHAT, HELLO)
    page = await (await tiny_gateway.http.get("/metrics")).text()
    for line in (
        'llmasos_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'llmasos_tokens_total{kind="completion",model="tiny"} 12.0',
        'llmasos_time_to_first_token_seconds_count{model="tiny"} 1.0',
        'llmasos_swarm_weakest_block_peers{model="tiny"} 1.0',
        "llmasos_texts_running 0.0",
        'llmasos_hop_seconds_count{part="compute"} 2.0',
    ):
        assert line in page
    health = await tiny_gateway.http.get("/health")
    assert (health.status, (await health.json())["status"]) == (200, "ok")
    assert "/v1/chat/completions" in (await (await tiny_gateway.http.get("/openapi.json")).json())["paths"]


async def test_the_page_may_load_nothing_from_elsewhere(tiny_gateway: Served) -> None:
    page = await tiny_gateway.http.get("/")
    assert page.content_type == "text/html"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("page.js", "page.css"):
        assert (await tiny_gateway.http.get(f"/web/{name}")).status == 200
