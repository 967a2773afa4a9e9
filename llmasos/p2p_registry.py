"""The registry over a Kademlia DHT of strangers: signed records, a strict validator, and reads that only go forward.

One key per topic, one subkey per peer. What is stored under a subkey is an envelope: the topic, the value, and the
signature of the peer that the subkey names over topic, peer, value and expiry. Anybody can check it knowing nothing
else, and every node that stores or reads does: what is not exactly that is refused before it is kept or parsed.

The DHT remains a hint. A node on the way can withhold records; it cannot make or extend one. What was seen once is
remembered until it expires, so that a lying or lagging replica cannot make a live peer vanish either.
"""

import asyncio
import hashlib
import logging
import math
from typing import Any

import msgspec

from llmasos.config import LOOKUP_TIMEOUT_S, MAX_LEASE_S, MAX_RECORD_BYTES
from llmasos.errors import SwarmUnreachableError
from llmasos.identity import MAX_PEER_ID_CHARS, SIGNATURE_BYTES, Identity, verify
from llmasos.network import MAX_TOPIC_CHARS, PeerId, Published, check_publication
from llmasos.p2p_hivemind import DHTID, RecordValidatorBase, get_dht_time

logger = logging.getLogger(__name__)

CLOCK_SKEW_S = 3.0
"""How far the clocks of two peers may be apart; hivemind asks for the same."""
MAX_ENVELOPE_BYTES = MAX_RECORD_BYTES + 4 * MAX_TOPIC_CHARS + SIGNATURE_BYTES + 32
MAX_VERDICTS = 50_000
"""Signatures remembered as good or bad. A look-up checks each record once per replica that answers (130 us each)."""
MAX_TOPICS = 160
"""Topics whose last look-up is remembered: all of one look at the swarm (`MAX_MODELS` in `routing/directory.py`)."""

_CONTEXT = "llmasos/registry/1"
_STEP_S = 0.001


class _Envelope(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    topic: str
    value: bytes
    signature: bytes


_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)
_bytes_decoder = msgspec.msgpack.Decoder(bytes)
_text_decoder = msgspec.msgpack.Decoder(str)


def _signed(topic: str, peer: str, value: bytes, expires_at: float) -> bytes:
    return msgspec.msgpack.encode((_CONTEXT, topic, peer, value, float(expires_at)))


def seal(identity: Identity, topic: str, value: bytes, expires_at: float) -> bytes:
    """The envelope of this identity's value."""
    signature = identity.sign(_signed(topic, identity.peer_id, value, expires_at))
    return msgspec.msgpack.encode(_Envelope(topic, value, signature))


def unseal(topic: str, peer: str, envelope: bytes, expires_at: float) -> bytes | None:
    """The value inside, if `peer` sealed exactly this for `topic` until `expires_at`."""
    if len(envelope) > MAX_ENVELOPE_BYTES or not 0 < len(peer) <= MAX_PEER_ID_CHARS:
        return None
    try:
        opened = _envelope_decoder.decode(envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if opened.topic != topic or len(opened.value) > MAX_RECORD_BYTES or len(opened.signature) != SIGNATURE_BYTES:
        return None
    return opened.value if verify(peer, _signed(topic, peer, opened.value, expires_at), opened.signature) else None


class Validator(RecordValidatorBase):  # type: ignore[misc]
    """What every node asks of a record before it stores it, hands it on or reads it."""

    def __init__(self) -> None:
        self._verdicts: dict[bytes, bool] = {}

    def validate(self, record: Any) -> bool:
        expires_at = record.expiration_time
        if not isinstance(expires_at, float) or not math.isfinite(expires_at):
            return False
        if expires_at > get_dht_time() + MAX_LEASE_S + CLOCK_SKEW_S:
            return False
        if len(record.subkey) > MAX_PEER_ID_CHARS + 8 or len(record.value) > MAX_ENVELOPE_BYTES + 8:
            return False
        digest = hashlib.blake2b(record.key, digest_size=16)
        for part in (record.subkey, record.value, expires_at.hex().encode()):
            digest.update(len(part).to_bytes(4, "big") + part)
        name = digest.digest()
        verdict = self._verdicts.get(name)
        if verdict is None:
            verdict = self._verdicts[name] = self._is_signed(record)
            if len(self._verdicts) > MAX_VERDICTS:
                del self._verdicts[next(iter(self._verdicts))]
        return verdict

    def _is_signed(self, record: Any) -> bool:
        try:
            peer = _text_decoder.decode(record.subkey)
            envelope = _bytes_decoder.decode(record.value)
            topic = _envelope_decoder.decode(envelope).topic
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        if not 0 < len(topic) <= MAX_TOPIC_CHARS or DHTID.generate(topic).to_bytes() != record.key:
            return False
        return unseal(topic, peer, envelope, record.expiration_time) is not None


class Registry:
    """Publish and look up through one DHT node. `client`: the node stores nothing for others, so not for us either."""

    def __init__(self, node: Any, identity: Identity, *, client: bool) -> None:
        self._node = node
        self._identity = identity
        self._client = client
        self._last_expiry: dict[str, float] = {}
        self._seen: dict[str, dict[PeerId, Published]] = {}

    async def publish(self, topic: str, value: bytes, lease_s: float) -> bool:
        check_publication(topic, value, lease_s)
        # the DHT prefers the later expiry, so that each store must expire later than the one it replaces
        expires_at = max(get_dht_time() + lease_s, self._last_expiry.get(topic, 0.0) + _STEP_S)
        self._last_expiry[topic] = expires_at
        envelope = seal(self._identity, topic, value, expires_at)
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                stored = await self._node.store(
                    topic, envelope, expires_at, subkey=str(self._identity.peer_id), exclude_self=self._client
                )
        except Exception as error:  # a store that fails is tried again by the next; hivemind may raise anything
            logger.warning("publishing under %r failed: %r", topic, error)
            logger.debug("publishing under %r failed", topic, exc_info=error)
            return False
        return bool(stored)

    async def lookup(self, topic: str) -> dict[PeerId, Published]:
        failure: Exception | None = None
        found = None
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                found = await self._node.get(topic, latest=True)
        except Exception as error:
            failure = error
            logger.debug("looking up %r failed", topic, exc_info=error)
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        seen = self._seen.pop(topic, {})
        for peer, (envelope, expires_at) in entries.items():
            known = seen.get(peer)
            if known is None or known.expires_at < expires_at:
                value = unseal(topic, peer, envelope, expires_at)
                if value is not None:
                    seen[PeerId(peer)] = Published(PeerId(peer), value, expires_at)
        now = get_dht_time()
        live = {peer: entry for peer, entry in seen.items() if now < entry.expires_at}
        if failure is not None and not live:
            raise SwarmUnreachableError(
                f"the registry did not answer within {LOOKUP_TIMEOUT_S:g} s", hint="check that a bootstrap peer runs"
            ) from failure
        if live:
            self._seen[topic] = live  # at the end: the topics that were not asked for longest come first
            if len(self._seen) > MAX_TOPICS:
                del self._seen[next(iter(self._seen))]
        return dict(live)
