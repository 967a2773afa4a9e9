"""Peers that compute in different numbers in one swarm: who asks for some uses those peers and no others."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sim.local import LocalSwarm
from tests.commands import llmasos_here

PEERS = {
    "plain": (),
    "half": ("--dtype", "bfloat16"),
    "small": ("--quantize", "int8"),
}
"""Each with all blocks, and the options that it is started with."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mixed(swarm: LocalSwarm) -> AsyncIterator[LocalSwarm]:
    await asyncio.gather(*(swarm.start_peer(name, "0:30", *options) for name, options in PEERS.items()))
    yield swarm


async def test_everybody_sees_which_numbers_there_are(mixed: LocalSwarm) -> None:
    shown = json.loads((await llmasos_here("status", "--json", "--join", mixed.address)).stdout)
    numbers = {peer["name"]: (peer["dtype"], peer["quantization"]) for peer in shown["models"][0]["peers"]}
    assert numbers == {"plain": ("float32", "none"), "half": ("bfloat16", "none"), "small": ("float32", "int8")}


@pytest.mark.parametrize(
    ("options", "peer"),
    [((), "plain"), (("--dtype", "bfloat16"), "half"), (("--quantization", "int8"), "small")],
    ids=["float32", "bfloat16", "int8"],
)
async def test_who_asks_for_numbers_gets_them(options: tuple[str, ...], peer: str, mixed: LocalSwarm) -> None:
    asked = ["generate", "The capital of France is", "--join", mixed.address, "--max-new-tokens", "6", "--json"]
    done = await llmasos_here(*asked, *options)
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert {hop["peer"] for hop in result["route"]} == {mixed.peers[peer].peer_id}
    assert "Paris" in result["text"]
    route = await llmasos_here("route", "--join", mixed.address, *options)
    assert route.stdout == f"0:30\t{mixed.peers[peer].peer_id}\n"


@pytest.mark.parametrize("command", [["generate", "Hello"], ["route", "--explain"]], ids=" ".join)
async def test_without_such_peers_it_is_told_what_there_is(command: list[str], mixed: LocalSwarm) -> None:
    done = await llmasos_here(*command, "--join", mixed.address, "--quantization", "int4")
    assert (done.code, done.stdout) == (1, "")
    assert "blocks 0:30 of smollm2 have no peer" in done.stderr
    for numbers in ("serving float32", "serving bfloat16", "serving float32 int8"):
        assert numbers in done.stderr
    assert "python -m llmasos.peer --blocks 0:30 --model smollm2 --quantize int4 --join" in done.stderr
