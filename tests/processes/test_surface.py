"""The commands and the snippet of the README, on a swarm of three peers."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from llmasos.config import NetworkConfig
from llmasos.p2p import P2PNetwork
from llmasos.wire import PROTOCOL, Contact, Failed, Ping, Pong, decode, encode
from sim.local import LocalProcess, LocalSwarm
from tests.processes.conftest import command

SNIPPET = """
from llmasos import LLMasOS
with LLMasOS(endpoint={address!r}) as client:
    text = client.generate_text(prompt="The world is", model_name="smollm2", max_length=20)
    print(text)
    print("".join(client.stream_text("The world is", max_new_tokens=17)))
    print([len(r.token_ids) for r in client.generate_batch(["One", "Two three"], max_new_tokens=5)])
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(swarm: LocalSwarm) -> AsyncIterator[LocalSwarm]:
    await asyncio.gather(
        *(swarm.start_peer(name, blocks) for name, blocks in (("a", "0:10"), ("b", "10:20"), ("<b>c</b>", "20:30")))
    )
    yield swarm


async def test_generate_prints_the_completion_and_nothing_else(three: LocalSwarm) -> None:
    plain = await command("llmasos", "generate", "The world is", "--join", three.address, "--max-new-tokens", "12")
    assert plain.code == 0
    assert plain.stdout.startswith(" a ")
    assert plain.stdout.endswith("\n")
    full = await command(
        "llmasos", "generate", "The world is", "--join", three.address, "--max-new-tokens", "12", "--json"
    )
    result = json.loads(full.stdout)
    assert full.stdout.count("\n") == 1
    assert result["text"] + "\n" == plain.stdout
    assert set(result) == {
        "text",
        "token_ids",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "route",
        "time_to_first_token_s",
        "tokens_per_s",
        "failovers",
    }
    assert (result["prompt_tokens"], result["completion_tokens"], result["finish_reason"]) == (3, 12, "length")
    assert [hop["blocks"] for hop in result["route"]] == ["0:10", "10:20", "20:30"]
    assert {hop["peer"] for hop in result["route"]} == {peer.peer_id for peer in three.peers.values()}


async def test_a_prompt_from_stdin_with_a_stop_text_and_a_seed(three: LocalSwarm) -> None:
    options = ["--join", three.address, "--temperature", "0.8", "--seed", "7", "--top-k", "40", "--top-p", "0.9"]
    runs = [
        await command("llmasos", "generate", "-", *options, "--stop", ".", stdin="Once upon a time, ünï".encode())
        for _ in range(2)
    ]
    assert runs[0].code == 0
    assert runs[0].stdout == runs[1].stdout
    assert "." not in runs[0].stdout


async def test_the_python_snippet(three: LocalSwarm) -> None:
    done = await command("-c", SNIPPET.format(address=three.address))
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("The world is a ")
    assert "[5, 5]" in done.stdout


async def test_status_shows_what_is_served(three: LocalSwarm) -> None:
    shown = json.loads((await command("llmasos", "status", "--join", three.address, "--json")).stdout)
    (model,) = shown["models"]
    assert (model["model"], model["blocks"], model["covered"], model["missing"]) == ("smollm2", 30, True, [])
    keys = [
        "peer",
        "name",
        "blocks",
        "state",
        "throughput",
        "load",
        "kv_free_tokens",
        "dtype",
        "quantization",
        "version",
        "age_s",
    ]
    assert all(set(peer) == set(keys) for peer in model["peers"])
    assert {peer["name"]: peer["blocks"] for peer in model["peers"]} == {"a": "0:10", "b": "10:20", "<b>c</b>": "20:30"}
    assert all(peer["state"] == "online" and peer["age_s"] < 20 for peer in model["peers"])
    table = await command("llmasos", "status", "--join", three.address)
    assert table.stdout == ""
    assert "usable" in table.stderr
    assert "<b>c</b>" in table.stderr


@pytest.mark.parametrize("frame", [b"", b"garbage", b"\x01\xc1", bytes(70_000)], ids=["empty", "text", "map", "zeros"])
async def test_garbage_on_the_wire_gets_an_answer_and_hurts_nobody(frame: bytes, three: LocalSwarm) -> None:
    async with await P2PNetwork.create(NetworkConfig(listen=False)) as stranger:
        peer = three.peers["a"]
        await stranger.join([peer.address])
        contact = Contact(peer.peer_id, (peer.address.partition("/p2p/")[0],))
        stream = await stranger.connect(contact, PROTOCOL)
        await stream.send(frame)
        assert isinstance(decode(await stream.receive()), Failed)
        alive = await stranger.connect(contact, PROTOCOL)
        await alive.send(encode(Ping(nonce=5)))
        pong = decode(await alive.receive())
        assert isinstance(pong, Pong)
        assert pong.nonce == 5
    assert peer.process.returncode is None


async def test_a_peer_alone_starts_a_swarm_prints_one_line_and_stops_politely() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "llmasos.peer",
        "--blocks",
        "0:12",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    address = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    assert address.startswith("/ip4/127.0.0.1/tcp/")
    missing = await command("llmasos", "generate", "Hello", "--join", address.strip())
    assert missing.code == 1
    assert "12:30" in missing.stderr
    assert "--blocks 12:30" in missing.stderr
    assert "Traceback" not in missing.stderr
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert await process.stdout.read() == b""
    talk = (await process.stderr.read()).decode()
    for word in ("serves", "speed", "room", "swarm", "watch", "stop", "12:30"):
        assert word in talk
    assert "Traceback" not in talk


def peak_mib(peer: LocalProcess) -> float:
    status = Path(f"/proc/{peer.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


async def test_memory_of_three_blocks_is_that_of_three_blocks() -> None:
    """Peak memory of a peer: the runtime, and the blocks that it was asked for."""
    peaks = {}
    for blocks in ("0:3", "0:30"):
        async with LocalSwarm() as swarm:
            peer = await swarm.start_peer("peer", blocks)
            peaks[blocks] = peak_mib(peer)
    block_mib = 3.54e6 * 4 / 2**20  # parameters of a block of smollm2, float32
    assert peaks["0:30"] - peaks["0:3"] > 20 * block_mib
    assert peaks["0:3"] < 700


async def test_a_stopped_peer_leaves_status_at_once_and_a_killed_one_within_30_s(three: LocalSwarm) -> None:
    await three.start_peer("to stop", "0:2")
    await three.start_peer("to kill", "2:4")
    assert await three.stop("to stop") == 0
    assert await _online(three) == {"a", "b", "<b>c</b>", "to kill"}
    await three.kill("to kill")
    begin = time.monotonic()
    while "to kill" in await _online(three):
        assert time.monotonic() - begin < 30
    assert await _online(three) == {"a", "b", "<b>c</b>"}


async def _online(swarm: LocalSwarm) -> set[str]:
    shown = json.loads((await command("llmasos", "status", "--join", swarm.address, "--json")).stdout)
    return {peer["name"] for model in shown["models"] for peer in model["peers"] if peer["state"] == "online"}
