"""Keys, peer ids and signatures; what the files look like is fixed by libp2p."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.errors import UsageError
from llmasos.identity import Identity, base58_decode, base58_encode, peer_id_of, public_key_of, verify
from llmasos.multiaddr import EXAMPLE, is_transport, parse_multiaddr

SEED = bytes(range(32))


def test_a_seed_always_gives_the_same_libp2p_names() -> None:
    identity = Identity(SEED)
    # computed by go-libp2p (p2pd -id FILE) from this key file
    assert identity.peer_id == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
    assert identity.key_file()[:4] == bytes.fromhex("08011240")
    assert identity.key_file()[4:36] == SEED
    assert peer_id_of(public_key_of(identity.peer_id)) == identity.peer_id


def test_a_signature_is_good_for_one_signer_and_one_message() -> None:
    alice, bob = Identity.generate(), Identity.generate()
    signature = alice.sign(b"message")
    assert verify(alice.peer_id, b"message", signature)
    assert not verify(alice.peer_id, b"another", signature)
    assert not verify(bob.peer_id, b"message", signature)
    assert not verify(alice.peer_id, b"message", signature[:-1])
    assert not verify("not an id", b"message", signature)
    assert not verify("Qm" + "a" * 44, b"message", signature)


def test_a_repr_never_shows_the_key() -> None:
    identity = Identity.generate()
    assert repr(identity) == f"Identity({identity.peer_id})"


def test_a_key_file_is_made_once_private_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "there" / "key"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == made.key_file()
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert os.listdir(path.parent) == ["key"]  # noqa: PTH208 - no draft is left beside it


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first = Identity.load_or_create(path)
    with pytest.raises(FileExistsError):
        Identity.generate().save(path)
    assert Identity.load(path).peer_id == first.peer_id
    assert os.listdir(tmp_path) == ["key"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "damaged"),
        (b"garbage", "damaged"),
        (Identity(SEED).key_file()[:-1], "damaged"),
        (Identity(SEED).key_file()[:-1] + b"\x00", "damaged"),
        (b"\x08\x00\x12\xa7\x12" + bytes(2343), "RSA"),
    ],
)
def test_a_wrong_key_file_is_named_with_what_to_do(tmp_path: Path, contents: bytes, reason: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(contents)
    with pytest.raises(UsageError, match=reason) as caught:
        Identity.load_or_create(path)
    assert str(path) in caught.value.message
    assert caught.value.hint.endswith(f"mv {path} {path}.old")
    assert path.read_bytes() == contents


def test_a_place_that_cannot_hold_a_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "key", tmp_path):
        with pytest.raises(UsageError, match=str(path)):
            Identity.load_or_create(path)


@given(st.binary(min_size=1, max_size=58))
def test_base58_is_reversible(data: bytes) -> None:
    assert base58_decode(base58_encode(data)) == data


@given(st.text(max_size=90))
def test_a_text_is_a_peer_id_or_a_value_error(text: str) -> None:
    try:
        key = public_key_of(text)
    except ValueError:
        return
    assert peer_id_of(key) == text


def test_multiaddrs() -> None:
    contact = parse_multiaddr(f"  {EXAMPLE}\n")
    assert contact.addresses == ("/ip4/203.0.113.5/tcp/4001",)
    assert EXAMPLE.endswith(contact.peer)
    for transport in ("/ip6/::1/tcp/1", "/dns4/a.example/tcp/65535", "/dns/localhost/tcp/80"):
        assert is_transport(transport)
        assert parse_multiaddr(f"{transport}/p2p/{contact.peer}").addresses == (transport,)
    for wrong in (
        "/ip4/1.2.3/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/1/ws",
        "/ip4/1.2.3.4/udp/1/quic-v1",
        f"/ip4/1.2.3.4/tcp/1/p2p/{contact.peer}/p2p-circuit",
        "/unix/tmp/x",
        "",
    ):
        assert not is_transport(wrong)
        with pytest.raises(UsageError) as caught:
            parse_multiaddr(f"{wrong}/p2p/{contact.peer}")
        assert EXAMPLE in caught.value.hint
