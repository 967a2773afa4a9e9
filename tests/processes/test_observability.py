"""What runs can be watched: a peer's metrics, from a real process."""

import asyncio
import json
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.config import PREFIX_PAGE_TOKENS, ClientConfig, NetworkConfig
from llmasos.local import LocalProcess
from llmasos.logs import session_label
from llmasos.multiaddr import parse_multiaddr
from llmasos.p2p import P2PNetwork
from llmasos.wire import PROTOCOL, Failed, Open, decode, encode
from sim.local import LocalSwarm
from tests.processes.conftest import command
from tests.test_cli import free_port


async def metrics_at(port: int) -> dict[str, float]:
    """By name and labels, as Prometheus would read them."""

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            return str(page.read().decode())

    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(read))
        for sample in family.samples
    }


async def be_refused(peer: LocalProcess) -> None:
    """Ask for a session of a model that is not there."""
    async with await P2PNetwork.create(NetworkConfig(listen=False)) as stranger:
        await stranger.join([peer.address])
        stream = await stranger.connect(parse_multiaddr(peer.address), PROTOCOL)
        await stream.send(encode(Open(session="s", digest="another", dtype="float32", start=0, end=3, tokens=9)))
        assert isinstance(decode(await stream.receive()), Failed)


async def test_a_peer_counts_what_it_does(swarm: LocalSwarm) -> None:
    port = free_port()
    peer = await swarm.start_peer("watched", "0:30", "--metrics-port", str(port), "--kv-tokens", "500")
    before = await metrics_at(port)
    assert before["llmasos_peer_kv_free_tokens"] == 500
    assert before["llmasos_peer_tokens_total"] == 0
    about = next(name for name in before if name.startswith("llmasos_peer_info"))
    assert "blocks=0:30" in about
    assert f"peer={peer.peer_id}" in about
    prompt = "The world is " + ", ".join(map(str, range(20)))
    async with AsyncLLMasOS(swarm.address, config=ClientConfig(speculate=False)) as client:
        results = [await client.generate(prompt, max_new_tokens=10) for _ in range(2)]
    await be_refused(peer)
    after = await metrics_at(port)
    cached = after["llmasos_peer_prefix_tokens_total"]
    assert cached == (results[0].prompt_tokens - 1) // PREFIX_PAGE_TOKENS * PREFIX_PAGE_TOKENS > 0
    # the prompts but for what was cached, and each token but the last
    asked = sum(result.prompt_tokens + result.completion_tokens - 1 for result in results)
    assert after["llmasos_peer_tokens_total"] == asked - cached
    assert after["llmasos_peer_pass_seconds_count"] == after["llmasos_peer_batch_tokens_count"] >= 2
    assert after["llmasos_peer_batch_tokens_sum"] == after["llmasos_peer_tokens_total"]
    assert 0 < after["llmasos_peer_pass_seconds_sum"] < 60
    assert after["llmasos_peer_queue_seconds_count"] >= 20
    assert after["llmasos_peer_sessions_refused_total reason=unsupported"] == 1
    assert (after["llmasos_peer_sessions"], after["llmasos_peer_kv_used_tokens"]) == (0, 0)
    assert after["process_resident_memory_bytes"] > 1e8


async def test_a_port_that_is_taken_is_refused_by_name(swarm: LocalSwarm) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", port := free_port())
    async with server:
        done = await command("-m", "llmasos.peer", "--blocks", "0:1", "--metrics-port", str(port))
    assert done.code == 2
    assert f"port {port}" in done.stderr
    assert "--metrics-port" in done.stderr
    assert "Traceback" not in done.stderr


async def test_with_json_every_line_of_a_peer_is_an_object(swarm: LocalSwarm) -> None:
    peer = await swarm.start_peer("logged", "0:2", "--log-format", "json", "--debug")
    await be_refused(peer)
    assert await swarm.stop("logged") == 0
    entries = [json.loads(line) for line in peer.stderr]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
    assert "stopped" in [entry["message"] for entry in entries]
    (refused,) = [entry for entry in entries if "refused a session" in entry["message"]]
    assert refused["session"] == session_label("s")
