"""The Network seam: peers, streams, the registry, and time.

Everything between this seam and the Runner seam - peer, scheduler, session, planner - is the same code in a real
swarm (`llmasos.p2p`: libp2p and a Kademlia DHT) and in the simulator (`sim.network`: memory and virtual time). So
nothing there reads a clock or opens a socket: it asks a `Network`. Both pass `tests/contract/test_network.py`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NewType, Protocol, Self

from llmasos.config import MAX_LEASE_S, MAX_RECORD_BYTES
from llmasos.errors import LLMasOSError, PeerTimeoutError, UsageError, short_id
from llmasos.wire import Contact

logger = logging.getLogger(__name__)

PeerId = NewType("PeerId", str)
"""A peer's name: the hash of its public key, as libp2p writes it (`12D3Koo…`)."""


class Stream(Protocol):
    """An ordered, authenticated, bidirectional stream of frames to one peer."""

    @property
    def peer(self) -> PeerId:
        """Who is at the other end; proven by its key, not claimed."""

    async def send(self, frame: bytes) -> None:
        """Hand over one frame; waits while the other side does not read. Raises ConnectionLostError.

        Several tasks may send on one stream; a cancelled send leaves the frame sent whole or not at all.
        """

    async def receive(self) -> bytes:
        """The next frame. Raises ConnectionLostError when the stream has ended or a frame is over MAX_FRAME_BYTES.

        One task receives at a time; a cancelled receive loses nothing.
        """

    async def close(self) -> None:
        """End the stream in both directions. May be called twice.

        What was sent before still arrives, and only then does the other side see the end; what the other side
        has in flight is dropped.
        """


MAX_TOPIC_CHARS = 256
"""A topic names a model; no alias or hub id comes near this."""

Handler = Callable[[Stream], Awaitable[None]]
"""Serves one inbound stream; the stream is closed when it returns."""


@dataclass(frozen=True, slots=True)
class Published:
    """A value in the registry, proven to be written by `peer`, valid until `expires_at` (seconds, network time)."""

    peer: PeerId
    value: bytes
    expires_at: float


class Network(Protocol):
    """One process's place in a swarm. An async context manager: leaving it closes every stream."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def contact(self) -> Contact:
        """How others reach this process."""

    @property
    def multiaddr(self) -> str:
        """What others pass to `join`; empty for a process that does not listen."""

    @property
    def failed(self) -> asyncio.Event:
        """Set when this process has lost its place for good (its own p2p daemon died): every call raises from then."""

    def now(self) -> float:
        """Seconds since the epoch, the clock of leases; near enough the same for all peers."""

    async def join(self, addresses: Sequence[str]) -> None:
        """Meet the peers at these multiaddrs. May be repeated. Raises SwarmUnreachableError when none answers."""

    def serve(self, protocol: str, handler: Handler) -> None:
        """Hand every inbound stream of `protocol` to `handler`. Before any peer can connect, so not awaited."""

    async def connect(self, contact: Contact, protocol: str) -> Stream:
        """Open a stream. Raises ConnectionLostError within CONNECT_TIMEOUT_S."""

    async def publish(self, topic: str, value: bytes, lease_s: float) -> bool:
        """Store this peer's own value under `topic` for `lease_s`; replaces its last one. False if no peer took it.

        Raises UsageError for an empty or endless topic, a value over MAX_RECORD_BYTES, a lease over MAX_LEASE_S.
        """

    async def lookup(self, topic: str) -> dict[PeerId, Published]:
        """The live values under `topic`, one a peer, as fresh as the registry has them. {} for an unknown topic.

        Raises SwarmUnreachableError when the registry does not answer within LOOKUP_TIMEOUT_S.
        """

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


Wrap = Callable[[Network], Network]
"""Puts something between a process and its network, such as links that are slower than they are here."""


async def call(network: Network, contact: Contact, protocol: str, frame: bytes, timeout_s: float) -> bytes:
    """One frame there, one frame back, on a stream of its own. Raises PeerTimeoutError, ConnectionLostError."""
    try:
        async with asyncio.timeout(timeout_s):
            stream = await network.connect(contact, protocol)
            try:
                await stream.send(frame)
                return await stream.receive()
            finally:
                await stream.close()
    except TimeoutError:
        raise PeerTimeoutError(contact.peer, f"no answer within {timeout_s:g} s") from None


async def run_handler(handler: Handler, stream: Stream) -> None:
    """Serve one inbound stream to its end. A failing handler costs that stream and one line in the log."""
    try:
        await handler(stream)
    except LLMasOSError as error:
        logger.debug("a stream of peer %s ended: %s", short_id(stream.peer), error.message)
    except Exception as error:  # whatever one stream does, the others go on
        logger.error("serving peer %s failed: %s: %s", short_id(stream.peer), type(error).__name__, error)
        logger.debug("serving peer %s failed", short_id(stream.peer), exc_info=error)
    finally:
        await stream.close()


def check_publication(topic: str, value: bytes, lease_s: float) -> None:
    """Raise UsageError for what no registry would take: our own mistake, never the peers'."""
    if not 0 < len(topic) <= MAX_TOPIC_CHARS:
        raise UsageError(f"a topic has 1 to {MAX_TOPIC_CHARS} characters, not {len(topic)}")
    if len(value) > MAX_RECORD_BYTES:
        raise UsageError(f"a record of {len(value)} bytes is over the limit of {MAX_RECORD_BYTES}")
    if not 0 < lease_s <= MAX_LEASE_S:
        raise UsageError(f"a lease lasts up to {MAX_LEASE_S:g} s, not {lease_s:g} s")
