"""What llmasos doctor finds, where it can be found without a swarm of processes."""

import socket

import pytest

from llmasos.doctor import Finding, Verdict, _completing, _passed, _port, _relay
from llmasos.errors import LLMasOSError
from llmasos.routing.directory import Directory
from sim.loop import run
from sim.network import SimSwarm, peer_of
from sim.swarm import SimCluster, SimModel


def relay(*, hung: tuple[str, ...] = ()) -> Finding:
    """What it says of a swarm of three, some of whom do not answer."""

    async def look() -> Finding:
        async with SimCluster(SimSwarm(seed=7), SimModel(blocks=12)) as cluster:
            for name in ("a", "b", "c"):
                await cluster.start(name, "0:12")
            async with cluster.client("client") as client:
                directory = Directory(client.network)
                await directory.refresh(cluster.model.name)
                for name in hung:
                    cluster.world.hang(peer_of(name))
                found = await _relay(client.network, directory.view.peers(cluster.model.name))
                cluster.world.heal()
                return found

    return run(look())


def test_no_relay_is_needed_where_everybody_answers() -> None:
    found = relay()
    assert (found.check, found.verdict, found.fix) == ("relay", "ok", "")
    assert "3 peers answer directly, in 2 ms" in found.found


@pytest.mark.parametrize(("hung", "verdict"), [(("b",), "warn"), (("a", "b", "c"), "fail")])
def test_who_cannot_be_reached_is_named_with_what_to_do(hung: tuple[str, ...], verdict: str) -> None:
    found = relay(hung=hung)
    assert found.verdict == verdict
    assert f"{len(hung)} of 3 peers" in found.found
    assert all(peer_of(name)[-8:] in found.found for name in hung)
    assert "--host 0.0.0.0" in found.fix


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = _port(port)
        assert (found.verdict, found.check) == ("fail", f"port {port}")
        assert f"--port {port + 1}" in found.fix
    assert _port(port).verdict == "ok"


async def test_a_check_that_fails_is_a_line_with_its_hint() -> None:
    from llmasos.doctor import _guarded

    async def broken() -> Finding:
        raise LLMasOSError("it is not there", hint="fetch it")

    assert await _guarded("model", broken) == Finding("model", "fail", "it is not there", "fetch it")


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (("ok", "ok", "ok"), "all 3 checks passed"),
        (("ok", "warn", "ok"), "2 of 3 checks passed, 1 warning"),
        (("warn", "warn", "ok"), "1 of 3 checks passed, 2 warnings"),
    ],
)
def test_a_warning_has_not_passed(verdicts: tuple[Verdict, ...], words: str) -> None:
    assert _passed([Finding("memory", verdict, "") for verdict in verdicts]) == words


def test_missing_blocks_are_served_in_the_numbers_that_miss_them() -> None:
    """Most peers of this swarm compute in others; the gap is that of int8."""
    peers = [("0:20", "float32", "int8"), ("0:3", "bfloat16", "none"), ("3:7", "bfloat16", "none")]
    shown = [{"blocks": b, "dtype": d, "quantization": q, "state": "online"} for b, d, q in peers]
    entry = {"blocks": 30, "missing": ["20:30"], "peers": shown}
    assert _completing(entry, "./a model.gguf", "ADDRESS") == (
        "python -m llmasos.peer --blocks 20:30 --model './a model.gguf' --quantize int8 --join ADDRESS"
    )
    entry["missing"] = ["7:30"]
    assert "--dtype bfloat16 --join" in _completing(entry, "smollm2", "ADDRESS")
