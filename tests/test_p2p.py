"""What is particular to the real network: hostile records, the daemon's life, frames on raw bytes, the lean import."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.config import MAX_FRAME_BYTES, MAX_LEASE_S, MAX_RECORD_BYTES, NetworkConfig
from llmasos.errors import ConnectionLostError, UsageError
from llmasos.identity import Identity
from llmasos.network import Stream, call
from llmasos.p2p import P2PNetwork, dialable
from llmasos.p2p_hivemind import DHTID, DHTRecord, get_dht_time
from llmasos.p2p_registry import Validator, seal, unseal
from llmasos.p2p_stream import END, FrameStream

ROOT = Path(__file__).parents[1]
ALICE, MALLORY = Identity(bytes(range(32))), Identity(bytes(range(1, 33)))
TOPIC = "smollm2"


async def eventually(found: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not await found():  # noqa: ASYNC110 - nothing tells when another node has noticed
            await asyncio.sleep(0.05)


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


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


# --- hostile records -------------------------------------------------------------------------------------------------


def pack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def record(
    *,
    key: bytes | None = None,
    subkey: Any = ALICE.peer_id,
    envelope: bytes | None = None,
    value: bytes | None = None,
    expires_at: Any = None,
) -> Any:
    """A valid record of Alice's, but for what is given."""
    expires_at = get_dht_time() + 20 if expires_at is None else expires_at
    envelope = seal(ALICE, TOPIC, b"blocks 0:12", expires_at) if envelope is None else envelope
    return DHTRecord(
        DHTID.generate(TOPIC).to_bytes() if key is None else key,
        subkey if isinstance(subkey, bytes) else pack(subkey),
        pack(envelope) if value is None else value,
        expires_at,
    )


NOW = get_dht_time()
HOSTILE = {
    "a value that is no msgpack": lambda: record(value=b"\xc1"),
    "an empty value": lambda: record(value=b""),
    "a value that is no envelope": lambda: record(envelope=b"\xc1"),
    "a list in place of bytes": lambda: record(value=pack([1, 2, 3])),
    "deeply nested lists": lambda: record(envelope=b"\x91" * 900 + b"\xc0"),
    "more fields in the envelope": lambda: record(envelope=pack([TOPIC, b"v", bytes(64), 1])),
    "an int subkey": lambda: record(subkey=7),
    "no subkey (a regular value)": lambda: record(subkey=None),
    "the dictionary mark as subkey": lambda: record(subkey=b""),
    "a subkey that is no msgpack": lambda: record(subkey=b"\xc1"),
    "a long subkey": lambda: record(subkey="1" * 100),
    "a subkey that is no peer id": lambda: record(subkey="alice"),
    "an RSA peer id": lambda: record(subkey="QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"),
    "somebody else's subkey": lambda: record(subkey=MALLORY.peer_id),
    "a key of another topic": lambda: record(key=DHTID.generate("other").to_bytes()),
    "an endless key": lambda: record(key=bytes(100)),
    "a longer life than was signed": lambda: record(envelope=seal(ALICE, TOPIC, b"v", NOW + 5), expires_at=NOW + 20.0),
    "a shorter life than was signed": lambda: record(envelope=seal(ALICE, TOPIC, b"v", NOW + 50), expires_at=NOW + 9.0),
    "a life of millennia": lambda: record(expires_at=NOW + 1e12),
    "a life just over the limit": lambda: record(expires_at=get_dht_time() + MAX_LEASE_S + 4),
    "an infinite life": lambda: record(expires_at=float("inf")),
    "no number for a life": lambda: record(expires_at=float("nan")),
    "a text for a life": lambda: record(envelope=b"", expires_at="tomorrow"),
    "a value over the limit": lambda: record(envelope=oversized()),
    "megabytes": lambda: record(value=bytes(3_900_000)),
    "a signature of another message": lambda: record(envelope=pack([TOPIC, b"v", ALICE.sign(b"v")])),
    "no signature": lambda: record(envelope=pack([TOPIC, b"v", b""])),
}


def oversized() -> bytes:
    return seal(ALICE, TOPIC, bytes(MAX_RECORD_BYTES + 1), get_dht_time() + 20)


def test_an_honest_record_is_valid_for_every_node_also_after_its_end() -> None:
    validator = Validator()
    assert validator.validate(record())
    assert validator.validate(record(expires_at=NOW - 5.0)), "dropping it is up to its reader, not a lie of the replica"


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_hostile_record_is_refused(kind: str) -> None:
    assert Validator().validate(HOSTILE[kind]()) is False


@given(st.binary(max_size=200), st.binary(max_size=90), st.binary(max_size=40), st.floats())
def test_a_validator_answers_anything_with_no(value: bytes, subkey: bytes, key: bytes, expires_at: float) -> None:
    assert Validator().validate(DHTRecord(key, subkey, value, expires_at)) is False


def test_verdicts_are_remembered_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr("llmasos.p2p_registry.MAX_VERDICTS", 10)
    monkeypatch.setattr("llmasos.p2p_registry.verify", lambda *arguments: checked.append(arguments) or True)
    validator, same = Validator(), record()
    assert all(validator.validate(same) for _ in range(5))
    assert len(checked) == 1
    for number in range(50):
        validator.validate(record(expires_at=NOW + number))
    assert len(validator._verdicts) <= 10


def test_an_envelope_opens_for_its_own_place_only() -> None:
    envelope = seal(ALICE, TOPIC, b"v", NOW)
    assert unseal(TOPIC, ALICE.peer_id, envelope, NOW) == b"v"
    assert unseal("other", ALICE.peer_id, envelope, NOW) is None
    assert unseal(TOPIC, MALLORY.peer_id, envelope, NOW) is None
    assert unseal(TOPIC, ALICE.peer_id, envelope, NOW + 1) is None


Start = Callable[..., Awaitable[P2PNetwork]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts networks, the later ones joined to the first of the test, and closes them all."""
    async with AsyncExitStack() as stack:
        first: list[P2PNetwork] = []

        async def start_one(*, alone: bool = False, **config: Any) -> P2PNetwork:
            network = await stack.enter_async_context(await P2PNetwork.create(NetworkConfig(**config)))
            if first and not alone:
                await network.join([first[0].multiaddr])
            first.append(network)
            return network

        yield start_one


def node_peer(network: P2PNetwork) -> Any:
    return network._daemon.p2p.peer_id


def port_of(network: P2PNetwork) -> int:
    return int(network.contact.addresses[0].rsplit("/", 1)[1])


@pytest.mark.swarm
async def test_an_attacker_inside_the_dht_harms_no_reader(start: Start) -> None:
    honest, reader, bystander, attacker = [await start() for _ in range(4)]
    assert await honest.publish(TOPIC, b"honest", 30)
    protocol, key = attacker._node.protocol, DHTID.generate(TOPIC)
    # 1. hostile records are refused one by one, whatever they look like
    for hostile in (record(value=b"\xc1"), record(subkey=7), record(value=bytes(1_500_000)), record(subkey=None)):
        subkey = msgspec.msgpack.decode(hostile.subkey)
        for victim in (honest, reader):
            stored = await protocol.call_store(
                node_peer(victim), [key], [hostile.value], [hostile.expiration_time], [subkey]
            )
            assert stored == [False]
    # 2. a replica that lies: bad entries of every kind, straight in its storage
    expires_at = get_dht_time() + 30
    for liar, value in ((MALLORY.peer_id, b"\xc1"), (7, pack(b"x")), (ALICE.peer_id, pack(bytes(100)))):
        protocol.storage.store_subkey(key, liar, value, expires_at)
    for network in (honest, reader, bystander):
        async with asyncio.timeout(5):
            found = await network.lookup(TOPIC)
        assert {peer: entry.value for peer, entry in found.items()} == {honest.peer_id: b"honest"}
    # 3. taking another's place in a routing table
    victim_node = honest._node.node_id
    protocol.node_info.node_id = victim_node.to_bytes()
    await protocol.call_ping(node_peer(reader))
    await asyncio.sleep(0.1)
    assert reader._node.protocol.routing_table.uid_to_peer_id[victim_node].to_base58() == honest.peer_id


@pytest.mark.swarm
async def test_an_old_record_sent_again_does_not_end_the_new_one(start: Start) -> None:
    honest, reader, attacker = [await start() for _ in range(3)]
    old_expiry = get_dht_time() + 1.0
    envelope = seal(honest._identity, TOPIC, b"old", old_expiry)
    assert await honest.publish(TOPIC, b"new", 30)
    for victim in (honest, reader):
        await attacker._node.protocol.call_store(
            node_peer(victim), [DHTID.generate(TOPIC)], [pack(envelope)], [old_expiry], [str(honest.peer_id)]
        )
    await asyncio.sleep(max(0.0, old_expiry + 0.2 - get_dht_time()))
    newcomer = await start()  # remembers nothing
    for network in (honest, reader, attacker, newcomer):
        assert (await network.lookup(TOPIC))[honest.peer_id].value == b"new"


# --- frames on raw bytes ---------------------------------------------------------------------------------------------


class FakeTransport(asyncio.Transport):
    """Keeps what is written; may be paused."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.reading = True
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def writelines(self, parts: Any) -> None:
        self.written += b"".join(parts)

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True


def frame_stream() -> tuple[FrameStream, FakeTransport]:
    stream, transport = FrameStream(greeted=True), FakeTransport()
    stream.connection_made(transport)
    return stream, transport


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 50), st.binary(max_size=130))
def test_frames_are_cut_alike_however_their_bytes_arrive(frames: list[bytes], step: int, hello: bytes) -> None:
    async def main() -> None:
        writer, written = frame_stream()
        for frame in frames:
            await writer.send(frame)
        await writer.close()
        size = len(hello)
        prefix = bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])
        data = prefix + hello + bytes(written.written)
        reader, transport = FrameStream(), FakeTransport()
        reader.connection_made(transport)
        for start in range(0, len(data), step):
            reader.data_received(data[start : start + step])
        assert await reader.hello == hello
        assert [await reader.receive() for _ in frames] == frames
        with pytest.raises(ConnectionLostError, match="the stream ended"):
            await reader.receive()
        assert transport.aborted

    asyncio.run(main())


async def test_a_frame_over_the_limit_ends_the_stream_before_it_takes_memory() -> None:
    stream, transport = frame_stream()
    stream.data_received((3).to_bytes(4, "big") + b"yes" + (MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x" * 100)
    assert await stream.receive() == b"yes"
    with pytest.raises(ConnectionLostError, match="announced a frame of 67108865 bytes"):
        await stream.receive()
    assert transport.aborted
    assert not stream._buffer


async def test_reading_pauses_while_nobody_receives() -> None:
    stream, transport = frame_stream()
    frame = (400_000).to_bytes(4, "big") + bytes(400_000)
    stream.data_received(frame * 3)
    assert not transport.reading
    await stream.receive()
    assert transport.reading
    stream.data_received(frame * 3)
    assert not transport.reading
    await stream.close()
    assert transport.reading, "a closed end drains the other, or that one would not get to the end mark"
    assert transport.written == END


async def test_a_closed_stream_lingers_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.p2p_stream.LINGER_S", 0.01)
    stream, transport = frame_stream()
    await stream.close()
    assert not transport.aborted
    await asyncio.sleep(0.05)
    assert transport.aborted


@pytest.mark.parametrize("hello", [b"\xff\xff\xff\xff\xff\xff", b"\xff\xff\x7f"])
async def test_an_absurd_hello_is_hung_up_on(hello: bytes) -> None:
    stream, transport = FrameStream(), FakeTransport()
    stream.connection_made(transport)
    stream.data_received(hello)
    assert transport.aborted
    stream.connection_lost(None)
    with pytest.raises(ConnectionLostError):
        await stream.hello


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
