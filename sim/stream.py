"""One stream of the simulated network: two ends, a wire each way, and timers for what is under way."""

import asyncio
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmasos.config import MAX_FRAME_BYTES
from llmasos.errors import ConnectionLostError, UsageError
from llmasos.network import PeerId
from sim.trace import ENDED

if TYPE_CHECKING:
    from sim.network import SimNetwork

WINDOW_BYTES = 1_100_000
"""What fits between a sender and a receiver that does not read (measured through two p2p daemons)."""
KEEPALIVE_S = 40.0
"""After this long without an answer the transport itself gives a connection up (yamux, measured 39.6 s)."""


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two peers. `jitter` is the largest random addition, as a share of the latency.

    A lost packet is no lost frame: the transport sends it again, so that `loss` (a share of packets) shows as delay.
    """

    latency_s: float = 0.001
    bytes_per_s: float = 125e6
    jitter: float = 0.0
    loss: float = 0.0


PACKET_BYTES = 1_400
"""What TCP carries in one packet on an ordinary path."""
MIN_RETRANSMIT_S = 0.2
"""Linux waits at least this long before it sends the last packet of a burst again; a step is one burst."""

LAN = Link()
LOOPBACK = Link(latency_s=0.0, bytes_per_s=1e9)


class Wire:
    """Latency, jitter, and one frame after the other at the link's rate."""

    __slots__ = ("free_at", "link", "rng")

    def __init__(self, link: Link, rng: random.Random) -> None:
        self.link = link
        self.rng = rng
        self.free_at = 0.0

    def delay_s(self, size_bytes: float = 0) -> float:
        link = self.link
        delay_s = link.latency_s * (1.0 + link.jitter * self.rng.random()) if link.jitter else link.latency_s
        if link.loss and self.rng.random() < link.loss * (1 + size_bytes // PACKET_BYTES):
            delay_s += max(MIN_RETRANSMIT_S, 3 * link.latency_s)
        return delay_s

    def arrival(self, now: float, size_bytes: float) -> float:
        """When something handed over now is all there."""
        self.free_at = max(now, self.free_at) + size_bytes / self.link.bytes_per_s
        return self.free_at + self.delay_s(size_bytes)


class SimStream:
    """One end of a stream; `other` is the far end. Frames that are under way to this end wait in `_in_flight`."""

    __slots__ = (
        "_arrived",
        "_ended",
        "_held_bytes",
        "_in_flight",
        "_reader",
        "_timer",
        "_wire",
        "_writers",
        "inbound",
        "other",
        "owner",
        "peer",
    )
    other: "SimStream"

    def __init__(self, owner: "SimNetwork", peer: PeerId, *, inbound: bool) -> None:
        self.owner = owner
        self.peer = peer
        self.inbound = inbound
        self._wire = owner.swarm.wire(owner.peer_id, peer)
        self._in_flight: deque[tuple[float, bytes | None]] = deque()  # (arrival, frame), None at the end
        self._arrived: deque[bytes] = deque()
        self._held_bytes = 0  # sent to this end and not yet read
        self._ended: str | None = None  # why, once nothing more can be sent; what has arrived can still be read
        self._reader: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        owner.streams[self] = None

    @property
    def held_bytes(self) -> int:
        """Sent to this end and not yet read."""
        return self._held_bytes

    # --- the contract ---

    async def send(self, frame: bytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise UsageError(f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
        if self._ended is not None:
            raise ConnectionLostError(self.peer, self._ended)
        while self.other._held_bytes > WINDOW_BYTES:
            waiter = self.owner.loop.create_future()
            self._writers.append(waiter)
            await waiter
            if self._ended is not None:
                raise ConnectionLostError(self.peer, self._ended)
        self._push(bytes(frame))

    async def receive(self) -> bytes:
        while not self._arrived:
            if self._ended is not None:
                raise ConnectionLostError(self.peer, self._ended)
            if self._reader is not None:
                raise RuntimeError("two tasks receive on one stream")
            self._reader = self.owner.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        frame = self._arrived.popleft()
        self._release(len(frame))
        return frame

    async def close(self) -> None:
        self.shut("this end was closed")

    # --- the machinery ---

    def shut(self, reason: str) -> None:
        """End both directions here; the other side sees it when all that is in flight has arrived."""
        if self._ended is None:
            self._end(reason)
            if self.other._ended is None:
                self._push(None)
        self._arrived.clear()
        self._in_flight.clear()
        self._release(self._held_bytes)

    def resume(self) -> None:
        """Deliver what a hang or a partition held back, in both directions."""
        for end in (self, self.other):
            if end._timer is not None:
                end._timer.cancel()
            end._deliver()

    def give_up_if_silent(self) -> None:
        """The transport's keep-alive has had no answer."""
        if not self.owner.swarm.reachable(self.owner.peer_id, self.peer):
            for end in (self, self.other):
                end._in_flight.clear()
                end._end("the connection timed out")

    def _push(self, frame: bytes | None) -> None:
        """Put a frame, or the end, on its way to the other side; never before what went before it."""
        owner, other = self.owner, self.other
        swarm = owner.swarm
        size = 0 if frame is None else len(frame)
        arrival = self._wire.arrival(owner.loop.time(), swarm.wire_bytes(size))
        swarm.trace.note(arrival, owner.number, other.owner.number, ENDED if frame is None else size)
        if other._ended is not None:  # it has closed, and we do not know that yet: it takes in no more than its window
            other._held_bytes += size
            return
        if other._in_flight:
            arrival = max(arrival, other._in_flight[-1][0])
        other._in_flight.append((arrival, frame))
        other._held_bytes += size
        if other._timer is None:
            other._schedule()

    def _schedule(self) -> None:
        loop = self.owner.loop
        self._timer = loop.call_at(max(loop.time(), self._in_flight[0][0]), self._deliver)

    def _deliver(self) -> None:
        """Take in every frame that is due; set the timer for the next. Called by the one that is set, or without."""
        self._timer = None
        owner, in_flight = self.owner, self._in_flight
        if not owner.swarm.reachable(owner.peer_id, self.peer):
            return  # held back; `resume` comes here again
        now = owner.loop.time()
        while in_flight and in_flight[0][0] <= now:
            frame = in_flight.popleft()[1]
            if frame is None:
                in_flight.clear()
                self._end("the stream ended")
            else:
                self._arrived.append(frame)
                _wake(self._reader)
        if in_flight:
            self._schedule()

    def _end(self, reason: str) -> None:
        if self._ended is None:
            self._ended = reason
            self.owner.streams.pop(self, None)
            _wake(self._reader)
            self._wake_writers()

    def _release(self, size: int) -> None:
        self._held_bytes -= size
        if self._held_bytes <= WINDOW_BYTES:
            self.other._wake_writers()

    def _wake_writers(self) -> None:
        for waiter in self._writers:
            _wake(waiter)
        self._writers.clear()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
