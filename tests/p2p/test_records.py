"""Records in the real hash table that lie, are stale, or are no records."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.config import MAX_LEASE_S, MAX_RECORD_BYTES
from llmasos.identity import Identity
from llmasos.p2p_hivemind import DHTID, DHTRecord, get_dht_time
from llmasos.p2p_registry import Validator, seal, unseal
from llmasos.routing.directory import MODELS_TOPIC, Directory
from tests.p2p.networks import TOPIC, Start, node_peer

ALICE, MALLORY = Identity(bytes(range(32))), Identity(bytes(range(1, 33)))


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


@pytest.mark.swarm
async def test_a_stranger_who_names_what_is_no_topic_hides_no_model(start: Start) -> None:
    honest, reader, stranger = [await start() for _ in range(3)]
    assert await honest.publish(MODELS_TOPIC, b'{"model": "smollm2"}', 30)
    assert await stranger.publish(MODELS_TOPIC, b'{"model": "\\ud800"}', 30)
    assert len(await reader.lookup(MODELS_TOPIC)) == 2
    directory = Directory(reader)
    await directory.refresh_all()
    assert await directory.models() == ["smollm2"]
