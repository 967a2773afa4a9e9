"""Links with a latency and a bandwidth between real processes: a `Network` around a `Network`.

The kernels that we run on delay nothing, so whoever receives does: a frame counts as sent when it comes in, and is
handed on when the link would have brought it. That way nothing is held in the sender, and what a process has sent
arrives even if it is killed. Frames of one pair share its bandwidth, whatever stream they are on; latency delays, and
limits no throughput. To open a stream takes one round trip, and so does a word with the registry.

What is in `llmasos` knows nothing of this: `sim.peer` starts the shipped peer on such a network, and `sim.local` its
clients.
"""

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import msgspec

from llmasos.errors import ConnectionLostError, UsageError
from llmasos.network import Handler, Network, PeerId, Published, Stream
from llmasos.tasks import TaskSet
from llmasos.wire import Contact
from sim.stream import LOOPBACK, WINDOW_BYTES, Link, Wire

CLIENT = "client"
"""What the process that sends the requests is called in `--link`."""

_LATENCY = re.compile(r"(?P<value>\d+(\.\d+)?)(?P<unit>us|ms|s)")
_BANDWIDTH = re.compile(r"(?P<value>\d+(\.\d+)?)(?P<unit>kbit|mbit|gbit)", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES_PER_S = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}


def parse_latency(text: str) -> float:
    """Seconds, of `50ms`. Raises UsageError."""
    match = _LATENCY.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no latency", hint="write 50ms, 0.2s or 300us")
    return float(match["value"]) * _SECONDS[match["unit"]]


def parse_bandwidth(text: str) -> float:
    """Bytes per second, of `100mbit`. Raises UsageError."""
    match = _BANDWIDTH.fullmatch(text)
    if match is None or float(match["value"]) == 0:
        raise UsageError(f"{text!r} is no bandwidth", hint="write 100mbit, 1gbit or 500kbit")
    return float(match["value"]) * _BYTES_PER_S[match["unit"].lower()]


@dataclass(frozen=True)
class Links:
    """What one process is connected to the others by; the same in both directions."""

    default: Link
    pairs: Mapping[PeerId, Link] = field(default_factory=dict)

    def to(self, peer: PeerId) -> Link:
        """The link between this process and a peer."""
        return self.pairs.get(peer, self.default)

    def to_json(self) -> str:
        """For the command line of a process."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises UsageError."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise UsageError(f"these are no links: {error}") from None


@dataclass(frozen=True)
class LinkPlan:
    """The links of a whole swarm, by the names of its processes."""

    default: Link = LOOPBACK
    pairs: Mapping[frozenset[str], Link] = field(default_factory=dict)

    @classmethod
    def parse(cls, latency: str | None, bandwidth: str | None, pairs: Iterable[str]) -> "LinkPlan":
        """Of `--latency`, `--bandwidth` and every `--link peer1-peer2=80ms,20mbit`. Raises UsageError."""
        default = Link(
            parse_latency(latency) if latency is not None else LOOPBACK.latency_s,
            parse_bandwidth(bandwidth) if bandwidth is not None else LOOPBACK.bytes_per_s,
        )
        plan: dict[frozenset[str], Link] = {}
        for text in pairs:
            names, _, values = text.partition("=")
            ends = frozenset(names.split("-"))
            if len(ends) != 2 or "" in ends or not values:
                raise UsageError(
                    f"{text!r} does not say which two are linked, and how",
                    hint="write --link peer1-peer2=80ms,20mbit, or client-peer1=80ms",
                )
            link = default
            for value in values.split(","):
                if _BANDWIDTH.fullmatch(value):
                    link = replace(link, bytes_per_s=parse_bandwidth(value))
                else:
                    link = replace(link, latency_s=parse_latency(value))
            plan[ends] = link
        return cls(default, plan)

    @property
    def plain(self) -> bool:
        """Whether there is nothing to inject."""
        return self.default == LOOPBACK and not self.pairs

    def check(self, names: Iterable[str]) -> None:
        """Raise UsageError when a link leads to somebody who is not there."""
        known = [*names, CLIENT]
        for name in sorted(name for ends in self.pairs for name in ends):
            if name not in known:
                raise UsageError(f"there is no {name} to link", hint=f"there are {', '.join(known)}")

    def among(self, names: Iterable[str]) -> "LinkPlan":
        """What is left of it in a swarm of these peers."""
        known = {*names, CLIENT}
        return LinkPlan(self.default, {ends: link for ends, link in self.pairs.items() if ends <= known})

    def links_of(self, name: str, ids: Mapping[str, PeerId]) -> Links:
        """The links of one process, by the ids of the others."""
        ends = {frozenset((name, other)): peer for other, peer in ids.items() if other != name}
        return Links(self.default, {peer: self.pairs[pair] for pair, peer in ends.items() if pair in self.pairs})


class LinkedNetwork:
    """A process's place in a swarm, as far from the others as `links` says. Both ends of a link must be such.

    `clock` says when frames come in and are due: by default the machine's, since uvloop's own counts milliseconds.
    """

    def __init__(self, inner: Network, links: Links, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner = inner
        self._links = links
        self._clock = clock
        self._wires: dict[PeerId, Wire] = {}  # from each peer to us: what all its streams share
        self._tasks = TaskSet()

    @property
    def peer_id(self) -> PeerId:
        return self._inner.peer_id

    @property
    def contact(self) -> Contact:
        return self._inner.contact

    @property
    def multiaddr(self) -> str:
        return self._inner.multiaddr

    @property
    def failed(self) -> asyncio.Event:
        return self._inner.failed

    def now(self) -> float:
        return self._inner.now()

    async def join(self, addresses: Sequence[str]) -> None:
        await self._ask_somebody()
        await self._inner.join(addresses)

    def serve(self, protocol: str, handler: Handler) -> None:
        async def handle(stream: Stream) -> None:
            linked = self._wrap(stream)
            try:
                await handler(linked)
            finally:
                await linked.close()

        self._inner.serve(protocol, handle)

    async def connect(self, contact: Contact, protocol: str) -> Stream:
        latency_s = self._links.to(PeerId(contact.peer)).latency_s
        await asyncio.sleep(latency_s)
        stream = self._wrap(await self._inner.connect(contact, protocol))
        try:
            await asyncio.sleep(latency_s)
        except asyncio.CancelledError:
            await stream.close()
            raise
        return stream

    async def publish(self, topic: str, value: bytes, lease_s: float) -> bool:
        await self._ask_somebody()
        return await self._inner.publish(topic, value, lease_s)

    async def lookup(self, topic: str) -> dict[PeerId, Published]:
        await self._ask_somebody()
        return await self._inner.lookup(topic)

    async def close(self) -> None:
        await self._inner.close()
        await self._tasks.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask_somebody(self) -> None:
        await asyncio.sleep(2 * self._links.default.latency_s)

    def _wrap(self, stream: Stream) -> "LinkedStream":
        wire = self._wires.get(stream.peer)
        if wire is None:
            wire = self._wires[stream.peer] = Wire(self._links.to(stream.peer), random.Random(stream.peer))
        linked = LinkedStream(stream, wire, self._clock)
        self._tasks.spawn(linked.read(), f"a link of {self.peer_id}")
        return linked


class LinkedStream:
    """A stream whose frames are under way for a while. `read()` must run meanwhile."""

    def __init__(self, inner: Stream, wire: Wire, clock: Callable[[], float]) -> None:
        self._inner = inner
        self._wire = wire
        self._clock = clock
        self._window_bytes = WINDOW_BYTES + wire.link.latency_s * wire.link.bytes_per_s
        self._under_way: deque[tuple[float, bytes | str]] = deque()  # (arrival, frame), or why there are no more
        self._held_bytes = 0
        self._room = asyncio.Event()
        self._reader: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def peer(self) -> PeerId:
        return self._inner.peer

    async def send(self, frame: bytes) -> None:
        await self._inner.send(frame)

    async def receive(self) -> bytes:
        if self._reader is not None:
            raise RuntimeError("two tasks receive on one stream")
        loop = asyncio.get_running_loop()
        while not self._closed:
            left_s = self._under_way[0][0] - self._clock() if self._under_way else None
            if left_s is not None and left_s <= 0:
                return self._take()
            self._reader = loop.create_future()
            timer = loop.call_later(left_s, _wake, self._reader) if left_s is not None else None
            try:
                await self._reader
            finally:
                self._reader = None
                if timer is not None:
                    timer.cancel()
        raise ConnectionLostError(self.peer, "this end was closed")

    async def close(self) -> None:
        self._closed = True
        self._under_way.clear()
        self._held_bytes = 0
        self._room.set()
        _wake(self._reader)
        await self._inner.close()

    async def read(self) -> None:
        """Take frames in as they come, as many as the link and the buffers at its ends hold, until the stream ends."""
        try:
            while True:
                while self._held_bytes > self._window_bytes:
                    self._room.clear()
                    await self._room.wait()
                frame = await self._inner.receive()
                self._held_bytes += len(frame)
                self._expect(frame, len(frame))
        except ConnectionLostError as error:
            self._expect(error.reason, 0)

    def _expect(self, what: bytes | str, size_bytes: int) -> None:
        """It was sent now, and comes when the link brings it, never before what was sent before it."""
        if self._closed:
            return
        arrival = self._wire.arrival(self._clock(), size_bytes)
        if self._under_way:
            arrival = max(arrival, self._under_way[-1][0])
        else:
            _wake(self._reader)
        self._under_way.append((arrival, what))

    def _take(self) -> bytes:
        """The frame that has arrived; the end stays, for whoever receives again."""
        what = self._under_way[0][1]
        if isinstance(what, str):
            raise ConnectionLostError(self.peer, what)
        self._under_way.popleft()
        self._held_bytes -= len(what)
        self._room.set()
        return what


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
