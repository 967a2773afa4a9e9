"""The Network seam: peers, streams, the registry, and time.

Everything between this seam and the Runner seam - peer, scheduler, session, planner - is the same code in a real
swarm (`llmasos.p2p`: libp2p and a Kademlia DHT) and in the simulator (`sim.network`: memory and virtual time). So
nothing there reads a clock or opens a socket: it asks a `Network`. Both pass `tests/contract/test_network.py`.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NewType, Protocol, Self

from llmasos.wire import Contact

PeerId = NewType("PeerId", str)
"""A peer's name: the hash of its public key, as libp2p writes it (`12D3Koo…`)."""


class Stream(Protocol):
    """An ordered, authenticated, bidirectional stream of frames to one peer."""

    @property
    def peer(self) -> PeerId:
        """Who is at the other end; proven by its key, not claimed."""

    async def send(self, frame: bytes) -> None:
        """Hand over one frame; waits while the other side does not read. Raises ConnectionLostError."""

    async def receive(self) -> bytes:
        """The next frame. Raises ConnectionLostError when the stream has ended or a frame is over MAX_FRAME_BYTES."""

    async def close(self) -> None:
        """End the stream in both directions. May be called twice."""


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

    def now(self) -> float:
        """Seconds since the epoch, the clock of leases; near enough the same for all peers."""

    async def join(self, addresses: Sequence[str]) -> None:
        """Meet the peers at these multiaddrs. May be repeated. Raises SwarmUnreachableError when none answers."""

    def serve(self, protocol: str, handler: Handler) -> None:
        """Hand every inbound stream of `protocol` to `handler`. Before any peer can connect, so not awaited."""

    async def connect(self, contact: Contact, protocol: str) -> Stream:
        """Open a stream. Raises ConnectionLostError within CONNECT_TIMEOUT_S."""

    async def publish(self, topic: str, value: bytes, lease_s: float) -> bool:
        """Store this peer's own value under `topic` for `lease_s`; replaces its last one. False if no peer took it."""

    async def lookup(self, topic: str) -> dict[PeerId, Published]:
        """The live values under `topic`, one a peer, as fresh as the registry has them."""

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
