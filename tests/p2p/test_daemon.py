"""The daemon's life, and the lean import of the real network."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llmasos.config import NetworkConfig
from llmasos.errors import ConnectionLostError, UsageError
from llmasos.network import Stream, call
from llmasos.p2p import P2PNetwork, dialable
from tests.p2p.networks import TOPIC, Start, echo, eventually, port_of

ROOT = Path(__file__).parents[2]


# --- the import ------------------------------------------------------------------------------------------------------


def in_a_new_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_network_is_imported_without_torch() -> None:
    heavy = in_a_new_process(
        "import sys, logging, llmasos.p2p\n"
        "print([name for name in ('torch', 'scipy', 'pydantic', 'hivemind.averaging') if name in sys.modules])\n"
        "print(logging.getLevelName(logging.WARNING))"
    )
    assert heavy.split("\n")[:2] == ["[]", "WARNING"]


@pytest.mark.swarm
def test_torch_may_be_imported_before_or_after() -> None:
    work = "import asyncio\nfrom llmasos.config import NetworkConfig\nfrom llmasos.p2p import P2PNetwork\n"
    start = "asyncio.run(main())\n"
    main = (
        "async def main():\n"
        "    async with await P2PNetwork.create(NetworkConfig()) as network:\n"
        "        print(await network.publish('t', b'x', 5))\n"
    )
    assert in_a_new_process(f"{work}import torch\n{main}{start}print(float(torch.ones(3).sum()))") == "True\n3.0\n"
    assert in_a_new_process(f"import torch\n{work}{main}{start}print(float(torch.ones(3).sum()))") == "True\n3.0\n"


# --- the daemon and its life -----------------------------------------------------------------------------------------


def test_loopback_addresses_come_last() -> None:
    assert dialable(
        ["/ip4/127.0.0.1/tcp/4001", "/ip4/192.0.2.7/tcp/4001", "/ip6/::1/tcp/4001", "/ip4/192.0.2.7/udp/4001/quic-v1"]
    ) == ("/ip4/192.0.2.7/tcp/4001", "/ip4/127.0.0.1/tcp/4001", "/ip6/::1/tcp/4001")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (NetworkConfig(host="my-laptop"), "'my-laptop' is not an IP address"),
        (NetworkConfig(host="192.0.2.1"), "cannot listen on 192.0.2.1"),
        (NetworkConfig(port=70_000), "70000 is not a port"),
        (NetworkConfig(identity=ROOT), "cannot be read"),
    ],
)
async def test_what_cannot_be_listened_on_is_named(config: NetworkConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        await P2PNetwork.create(config)
    assert caught.value.hint


@pytest.mark.swarm
async def test_a_port_or_an_identity_in_use_is_named(start: Start, tmp_path: Path) -> None:
    key = tmp_path / "key"
    network = await start(identity=key)
    with pytest.raises(UsageError, match="already in use") as caught:
        await P2PNetwork.create(NetworkConfig(port=port_of(network)))
    assert "--port" in caught.value.hint
    with pytest.raises(UsageError, match=f"{key} is in use") as caught:
        await P2PNetwork.create(NetworkConfig(identity=key))
    assert "--identity" in caught.value.hint


@pytest.mark.swarm
async def test_a_restarted_peer_keeps_its_id_and_is_found_at_its_new_port(start: Start, tmp_path: Path) -> None:
    caller, first = await start(), await start(identity=tmp_path / "key")
    first.serve("echo/1", echo)
    assert await call(caller, first.contact, "echo/1", b"1", 5) == b"1"
    await first.close()
    with pytest.raises(ConnectionLostError):
        await caller.connect(first.contact, "echo/1")
    second = await start(identity=tmp_path / "key")
    second.serve("echo/1", echo)
    assert second.peer_id == first.peer_id
    assert second.multiaddr != first.multiaddr
    assert await call(caller, second.contact, "echo/1", b"2", 5) == b"2"


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("llmasos-p2pd-*"))


@pytest.mark.swarm
async def test_nothing_is_left_behind(start: Start) -> None:
    tasks, before = asyncio.all_tasks(), folders()
    network, other = await start(), await start()
    child = network._daemon._child.pid
    assert os.getpgid(child) != os.getpgid(0), "Ctrl-C in the terminal must not reach it"
    assert network._daemon._folder in folders() - before
    assert network._daemon._folder.stat().st_mode & 0o077 == 0
    assert not (network._daemon._folder / "identity").exists()
    network.serve("echo/1", echo)
    stream = await other.connect(network.contact, "echo/1")
    for patience in range(20):  # callers who give up at every stage
        attempt = asyncio.create_task(other.connect(network.contact, "echo/1"))
        await asyncio.sleep(patience * 0.0002)
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
        if not attempt.cancelled():
            await attempt.result().close()
    await stream.close()

    async def only_idle() -> bool:
        return not network._streams and not other._streams and not network._inbound

    await eventually(only_idle)
    await network.close()
    await other.close()
    assert not network._daemon._folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)

    async def all_ended() -> bool:
        return asyncio.all_tasks() <= tasks

    await eventually(all_ended, within_s=3)


@pytest.mark.swarm
def test_the_daemon_does_not_outlive_a_process_killed_by_force() -> None:
    program = (
        "import asyncio\nfrom llmasos.config import NetworkConfig\nfrom llmasos.p2p import P2PNetwork\n"
        "async def main():\n"
        "    network = await P2PNetwork.create(NetworkConfig())\n"
        "    print(network._daemon._child.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        os.kill(child, 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break  # ended; whoever adopted it has not yet noticed
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.swarm
async def test_when_our_own_daemon_dies_what_is_under_way_ends_at_once(start: Start) -> None:
    other, network = await start(), await start()

    async def silent(stream: Stream) -> None:
        await asyncio.Event().wait()

    other.serve("silent/1", silent)
    stream = await network.connect(other.contact, "silent/1")
    os.kill(other._daemon._child.pid, signal.SIGSTOP)  # so that nothing of this is answered
    await asyncio.sleep(0.2)  # a signal reaches the threads of another process when it does
    try:
        operations = (
            network.lookup(TOPIC),
            network.publish(TOPIC, b"x", 5),
            network.join([other.multiaddr]),
            stream.receive(),
        )
        under_way = [asyncio.create_task(operation) for operation in operations]
        await asyncio.sleep(0.2)
        network._daemon._child.kill()
        async with asyncio.timeout(3):
            results = await asyncio.gather(*under_way, return_exceptions=True)
    finally:
        os.kill(other._daemon._child.pid, signal.SIGCONT)
    assert all(isinstance(result, ConnectionLostError) for result in results), results
    assert network.failed.is_set()
    with pytest.raises(ConnectionLostError, match="our own p2p daemon died"):
        network.serve("late/1", echo)


@pytest.mark.swarm
async def test_a_restarted_bootstrap_is_met_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmasos.p2p.WATCH_BOOTSTRAPS_EVERY_S", 0.2)
    bootstrap = await start(identity=tmp_path / "key")
    peer = await start()
    bootstrap._daemon._child.kill()
    await bootstrap.failed.wait()
    await bootstrap.close()
    assert await peer.publish(TOPIC, b"still here", 60)

    async def missed() -> bool:
        return not peer._node.protocol.routing_table.peer_id_to_uid

    await eventually(missed)
    again = await start(alone=True, identity=tmp_path / "key", port=port_of(bootstrap))
    newcomer = await start(alone=True)
    await newcomer.join([again.multiaddr])

    async def found() -> bool:
        return peer.peer_id in await newcomer.lookup(TOPIC)

    await eventually(found, within_s=15)
