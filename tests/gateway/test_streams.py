"""Streams of the gateway when something happens to them: clients that leave, peers that die, silence."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from llmasos.blocks.registry import ModelSpec
from llmasos.client.gateway_texts import Texts
from llmasos.peer.peer import Peer
from tests.gateway.conftest import (
    CHAT,
    COMPLETIONS,
    GO_ON,
    HELLO,
    SPANS,
    Served,
    error_of,
    folder_of,
    read_events,
    serve,
)


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


async def test_who_leaves_with_the_last_event_has_been_answered(
    listening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Texts.__aexit__

    async def end_slowly(texts: Texts, *error: Any) -> None:  # as over links, where hops have to be told
        await end(texts, *error)
        await asyncio.sleep(0.3)

    monkeypatch.setattr(Texts, "__aexit__", end_slowly)
    async with aiohttp.ClientSession(listening, connector=aiohttp.TCPConnector(force_close=True)) as http:
        for _ in range(3):
            answer = await http.post(CHAT, json={**HELLO, "max_tokens": 3, "stream": True})
            assert read_events(await answer.read()).done
        await asyncio.sleep(1.0)
        told = await (await http.get("/metrics")).text()
    assert f'llmasos_requests_total{{endpoint="{CHAT}",status="200"}} 3.0' in told
    assert "llmasos_requests_cancelled_total 0.0" in told


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
