"""The gateway over HTTP, in front of real blocks: what OpenAI's clients rely on."""

import asyncio
import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
from yarl import URL

from llmasos.blocks.registry import ModelSpec
from llmasos.client.token_bytes import TokenBytes
from llmasos.logs import JsonFormatter
from llmasos.peer.peer import Peer
from tests.gateway.conftest import SPANS, Served, folder_of, read_events, serve

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 3}
GO_ON = {"model": "tiny", "prompt": "ab", "max_tokens": 9, "seed": 3}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def error_of(body: dict[str, Any]) -> dict[str, Any]:
    """The error object, whose form never varies."""
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    found: dict[str, Any] = body["error"]
    return found


async def test_models(tiny_gateway: Served) -> None:
    listed = await (await tiny_gateway.http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert (await (await tiny_gateway.http.get("/v1/models/tiny")).json()) == listed["data"][0]
    missing = await tiny_gateway.http.get("/v1/models/huge")
    assert (missing.status, error_of(await missing.json())["code"]) == (404, "model_not_found")


async def test_a_model_with_a_gap_is_not_offered(tiny: ModelSpec) -> None:
    async with serve(tiny, ["0:2", "3:5"], source=folder_of(tiny)) as served:
        assert (await (await served.http.get("/v1/models")).json())["data"] == []
        answer = await served.http.post(CHAT, json=HELLO)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        error = error_of(await answer.json())
        assert error["code"] == "missing_blocks"
        assert "--blocks 2:3" in error["message"]


async def test_a_stream_says_what_the_answer_in_one_piece_says(tiny_gateway: Served) -> None:
    for path, body in ((CHAT, HELLO), (COMPLETIONS, GO_ON)):
        wanted = {**body, "n": 2}
        status, whole = await tiny_gateway.post(path, wanted)
        assert status == 200
        stream = await tiny_gateway.stream(path, wanted)
        assert stream.done
        for index, choice in enumerate(whole["choices"]):
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            assert stream.text(index) == text
        assert whole["choices"][0] != {**whole["choices"][1], "index": 0}
        heads = {(chunk["id"], chunk["created"], chunk["model"]) for chunk in stream.chunks}
        assert len(heads) == 1
        assert all("usage" not in chunk for chunk in stream.chunks)
    assert await tiny_gateway.kv_is_free()


async def test_the_form_of_a_chat_stream(tiny_gateway: Served) -> None:
    stream = await tiny_gateway.stream(CHAT, {**HELLO, "stream_options": {"include_usage": True}})
    *chunks, last = stream.chunks
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] in ("stop", "length")
    assert set(reasons[:-1]) == {None}
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 12


async def test_prompts_in_all_forms(tiny_gateway: Served) -> None:
    greedy = {**GO_ON, "temperature": 0}
    _, tokens = await tiny_gateway.post("/tokenize", {"model": "tiny", "prompt": "ab"})
    ids = tokens["tokens"]
    assert (tokens["count"], tokens["max_model_len"]) == (2, 256)
    texts = [
        [
            choice["text"]
            for choice in (await tiny_gateway.post(COMPLETIONS, {**greedy, "prompt": prompt}))[1]["choices"]
        ]
        for prompt in ("ab", ids, ["ab", "ba"], [ids, ids])
    ]
    assert texts[0] == texts[1] == texts[2][:1] == texts[3][:1] == texts[3][1:]
    _, detokenized = await tiny_gateway.post("/detokenize", {"model": "tiny", "tokens": ids})
    assert detokenized == {"prompt": "ab"}


async def test_scores_are_those_of_the_model(tiny: ModelSpec, tiny_gateway: Served) -> None:
    """Echo with logprobs is what evaluation harnesses read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder_of(tiny)).eval()
    ids = [40, 41, 77, 90, 12, 200]
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    body = {**GO_ON, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 3, "echo": True}
    _, answer = await tiny_gateway.post(COMPLETIONS, body)
    scores = answer["choices"][0]["logprobs"]
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    for position, token in enumerate(ids[1:]):
        assert scores["token_logprobs"][position + 1] == pytest.approx(float(wanted[position, token]), abs=1e-4)
        best = max(value for value in scores["top_logprobs"][position + 1].values())
        assert best == pytest.approx(float(wanted[position].max()), abs=1e-4)
    assert scores["token_logprobs"][-1] == pytest.approx(float(wanted[-1].max()), abs=1e-4)
    _, alone = await tiny_gateway.post(COMPLETIONS, {**body, "max_tokens": 0})
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(scores["token_logprobs"][:-1])
    assert alone["usage"]["completion_tokens"] == 0


async def test_chat_scores_have_bytes_that_make_up_the_text(tiny_gateway: Served) -> None:
    _, answer = await tiny_gateway.post(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2})
    choice = answer["choices"][0]
    scored = choice["logprobs"]["content"]
    raw = b"".join(bytes(token["bytes"]) for token in scored if token["token"] not in ("<s>", "<pad>"))
    assert raw.decode(errors="replace") == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in scored)
    stream = await tiny_gateway.stream(CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2})
    parts = [chunk["choices"][0]["logprobs"] for chunk in stream.chunks]
    assert [token for part in parts if part for token in part["content"]] == scored


async def test_a_schema_is_obeyed(tiny_gateway: Served) -> None:
    """By a model that writes noise."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        body = {**HELLO, "seed": seed, "max_tokens": 100, "temperature": 0.5, "response_format": wanted}
        _, answer = await tiny_gateway.post(CHAT, body)
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"])["a"] in (1, 2)
        else:
            assert choice["message"]["content"].lstrip().startswith("{")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}
    status, refused = await tiny_gateway.post(CHAT, {**HELLO, "response_format": bad})
    assert status == 400
    assert "banana" in error_of(refused)["message"]


async def test_biases_and_stops(tiny_gateway: Served) -> None:
    biased = {**GO_ON, "temperature": 0, "logit_bias": {"50": 100}}
    _, answer = await tiny_gateway.post(COMPLETIONS, biased)
    letter = answer["choices"][0]["text"][0]
    assert answer["choices"][0]["text"] == 9 * letter
    _, stopped = await tiny_gateway.post(COMPLETIONS, {**biased, "stop": [3 * letter, "never"]})
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == ("", "stop")
    assert stopped["usage"]["completion_tokens"] == 3
    stream = await tiny_gateway.stream(COMPLETIONS, {**biased, "stop": [f"{letter}x"]})
    assert stream.text() == 9 * letter


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({**HELLO, "model": "huge"}, 404, "model"),
        ({**HELLO, "model": "/etc"}, 404, "model"),
        ({**HELLO, "max_tokens": 250}, 400, "messages"),
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
    ],
    ids=["header", "line", "key", "tls", "gzip"],
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


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_frees_every_hop(stream: bool, tiny_gateway: Served) -> None:
    body = {**HELLO, "max_tokens": 230, "logit_bias": {"2": -100}, "stream": stream}
    request = asyncio.create_task(tiny_gateway.http.post(CHAT, json=body))
    await until(lambda: any(peer.engine.passes > 3 for peer in tiny_gateway.peers))
    if stream:
        (await request).close()
    else:
        request.cancel()
    await until(lambda: tiny_gateway.gateway.admission.running == 0)
    assert await tiny_gateway.kv_is_free()
    assert (await (await tiny_gateway.http.get("/api/activity")).json())["running"] == []


async def test_a_client_that_goes_away_while_it_waits(tiny: ModelSpec) -> None:
    body = {**HELLO, "max_tokens": 200, "logit_bias": {"2": -100}, "stream": True}
    async with serve(tiny, source=folder_of(tiny), max_running=1) as served:
        first = await served.http.post(CHAT, json=body)
        second = asyncio.create_task(served.http.post(CHAT, json=body))
        admission = served.gateway.admission
        await until(lambda: admission.waiting == 1)
        second.cancel()
        await until(lambda: admission.waiting == 0)
        assert read_events(await first.read()).done
        await until(lambda: admission.running == 0)
        assert await served.kv_is_free()


async def test_many_streams_at_once_say_what_each_says_alone(tiny_gateway: Served) -> None:
    bodies = [{**GO_ON, "prompt": f"text {seed}", "seed": seed, "temperature": 0.7} for seed in range(8)]
    alone = [(await tiny_gateway.stream(COMPLETIONS, body)).text() for body in bodies]
    together = await asyncio.gather(*(tiny_gateway.stream(COMPLETIONS, body) for body in bodies))
    assert [stream.text() for stream in together] == alone
    assert len(set(alone)) == len(bodies)
    assert await tiny_gateway.kv_is_free()


async def test_a_peer_lost_in_mid_stream_is_replaced_or_told(tiny: ModelSpec) -> None:
    body = {**HELLO, "max_tokens": 200, "logit_bias": {"2": -100}, "temperature": 0}

    async def lose_one(served: Served, name: str) -> bytes:
        answer = await served.http.post(CHAT, json={**body, "stream": True})
        first = await answer.content.readuntil(b"\n\n")
        await crash(served.peers, name, served)
        return first + await answer.read()

    async with serve(tiny, [*SPANS, "0:2", "2:5"], source=folder_of(tiny)) as served:
        _, whole = await served.post(CHAT, body)
        stream = read_events(await lose_one(served, "used"))
        assert stream.done
        assert stream.text() == whole["choices"][0]["message"]["content"]
        assert any(comment.startswith("rerouted") for comment in stream.comments)
        (failover,) = (await (await served.http.get("/api/activity")).json())["failovers"]
        assert len(failover["lost"]) == 1
        assert failover["lost"][0] not in failover["now"]
        assert failover["lost"][0]["peer"][-8:] in failover["why"]


async def crash(peers: list[Peer], which: str, served: Served) -> None:
    """End the peer that the running text goes through, as a crash would."""
    (texts,) = served.gateway.watch.texts.values()
    victim = texts.live[0].route[1]["peer"]
    (peer,) = [peer for peer in peers if peer.network.peer_id == victim]
    peer.network.die("killed")  # type: ignore[attr-defined]


async def test_a_silent_stream_is_kept_alive(tiny: ModelSpec) -> None:
    """By comments, which change nothing of what is said."""
    body = {**HELLO, "max_tokens": 40, "logit_bias": {"2": -100}}
    async with serve(tiny, source=folder_of(tiny), keep_alive_s=0.05) as served:
        _, whole = await served.post(CHAT, body)
        answer = await served.http.post(CHAT, json={**body, "stream": True})
        raw = await answer.content.readuntil(b"\n\n")
        network = served.peers[0].network
        network.swarm.hang(network.peer_id)  # type: ignore[attr-defined]
        while b": still at it" not in raw:
            raw += await answer.content.readuntil(b"\n\n")
        network.swarm.heal()  # type: ignore[attr-defined]
        stream = read_events(raw + await answer.read())
        assert stream.done
        assert stream.text() == whole["choices"][0]["message"]["content"]
        assert "still at it" in stream.comments


async def test_a_stream_never_holds_half_a_character(tiny_gateway: Served) -> None:
    """The model writes single bytes; the schema makes it write characters of two, three and four of them."""
    said = "ä漢🦊"
    schema = {"type": "object", "properties": {"a": {"const": said}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    stream = await tiny_gateway.stream(CHAT, {**HELLO, "max_tokens": 60, "response_format": form})
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in stream.chunks]
    assert set(said) <= set(pieces)
    assert json.loads("".join(pieces)) == {"a": said}


async def test_a_failure_in_mid_stream_is_an_event(tiny: ModelSpec) -> None:
    from llmasos.config import ClientConfig

    config = ClientConfig(wait_for_blocks_s=0.2)
    async with serve(tiny, source=folder_of(tiny), client_config=config) as served:
        body = {**HELLO, "max_tokens": 200, "logit_bias": {"2": -100}, "stream": True}
        answer = await served.http.post(CHAT, json=body)
        first = await answer.content.readuntil(b"\n\n")
        await crash(served.peers, "used", served)
        stream = read_events(first + await answer.read())
        assert not stream.done
        assert error_of(stream.chunks[-1])["code"] == "missing_blocks"


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


async def test_other_origins_only_when_asked(tiny: ModelSpec) -> None:
    async with serve(tiny, source=folder_of(tiny), cors_origins=("https://mine.example",)) as served:
        asked = await served.http.options(CHAT, headers={"Origin": "https://mine.example"})
        assert (asked.status, asked.headers["Access-Control-Allow-Origin"]) == (204, "https://mine.example")
        stranger = await served.http.get("/health", headers={"Origin": "https://other.example"})
        assert "Access-Control-Allow-Origin" not in stranger.headers


def test_bytes_of_tokens() -> None:
    class Sentencepiece:
        backend_tokenizer = None

        def get_added_vocab(self) -> dict[str, int]:
            return {"</s>": 2}

        def convert_ids_to_tokens(self, token: int) -> str | None:
            return {2: "</s>", 3: "▁the", 4: "<0x0A>"}.get(token)

    raw = TokenBytes(Sentencepiece())
    assert [raw(token) for token in (2, 3, 4, 99)] == [b"</s>", b" the", b"\n", b""]
