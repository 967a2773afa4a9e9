"""A `Network` in memory and virtual time: latency, bandwidth, jitter, back-pressure, and everything that goes wrong.

`SimSwarm` is the world: its members, the links between them, the registry they share, and one seeded source of
chance. `SimNetwork` is one member's place in it and keeps the contract of `llmasos.network`. Nothing runs while
nothing happens: a frame in flight is one timer, an idle stream is two small objects and no task.

The same seed gives the same run: chance is drawn in the order of events, and no set is ever iterated.
"""

import asyncio
import hashlib
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from llmasos.config import CONNECT_TIMEOUT_S, LOOKUP_TIMEOUT_S, MAX_LEASE_S, MAX_STREAMS_PER_PEER
from llmasos.errors import ConnectionLostError, SwarmUnreachableError
from llmasos.identity import peer_id_of
from llmasos.multiaddr import parse_multiaddr
from llmasos.network import Handler, PeerId, Published, Stream, check_publication, run_handler
from llmasos.tasks import TaskSet
from llmasos.wire import Contact
from sim.stream import KEEPALIVE_S, LAN, LOOPBACK, Link, SimStream, Wire
from sim.trace import HUNG, KILLED, LOOKED_UP, PUBLISHED, Trace

logger = logging.getLogger(__name__)

__all__ = ["KEEPALIVE_S", "LAN", "LOOPBACK", "Link", "SimNetwork", "SimRegistry", "SimStream", "SimSwarm", "Trace"]


HEADER_BYTES = 90
"""What a step weighs without its rows; more than that is taken for rows."""


def peer_of(name: str) -> PeerId:
    """The id of the member of that name, in every run."""
    return peer_id_of(hashlib.sha256(name.encode()).digest())


class SimSwarm:
    """Every member, every link, the registry; and the hand that breaks them."""

    def __init__(
        self,
        *,
        seed: int = 0,
        links: Callable[[PeerId, PeerId], Link] = lambda source, target: LAN,
        lookup_s: float = 0.01,
        stale_s: float = 0.0,
        row_scale: float = 1.0,
    ) -> None:
        """`lookup_s` is what one look-up or store takes; a reader may see the registry as it was `stale_s` ago.

        Rows weigh `row_scale` times what they do here: those of a real model are hundreds of times as wide.
        """
        self.rng = random.Random(seed)
        self.registry = SimRegistry(stale_s)
        self.lookup_s = lookup_s
        self.members: dict[PeerId, SimNetwork] = {}
        self.trace = Trace()
        self.row_scale = row_scale
        self._links = links
        self._wires: dict[tuple[PeerId, PeerId], Wire] = {}
        self._hung: dict[PeerId, None] = {}
        self._cut: dict[tuple[PeerId, PeerId], float | None] = {}

    def network(self, name: str, *, listen: bool = True) -> "SimNetwork":
        """A new member; its peer id depends on `name` only. The same name again is the same peer, restarted."""
        peer = peer_of(name)
        if peer in self.members:
            self.kill(peer)
            self._hung.pop(peer, None)
        self.members[peer] = SimNetwork(self, peer, name, listen)
        return self.members[peer]

    def restart(self, peer: PeerId) -> "SimNetwork":
        """The same peer again, with nothing left of its streams and handlers."""
        old = self.members[peer]
        return self.network(old.name, listen=old.listen)

    def kill(self, peer: PeerId) -> None:
        """The process dies: its streams end for the others one latency later, as a kernel would tell them."""
        self.trace.note(asyncio.get_running_loop().time(), self.members[peer].number, 0, KILLED)
        self.members[peer].die("this process was killed")

    def hang(self, peer: PeerId) -> None:
        """Silence: nothing to or from the peer arrives, and nobody is told; until `heal`."""
        self.trace.note(asyncio.get_running_loop().time(), self.members[peer].number, 0, HUNG)
        self._hung[peer] = None
        self._expect_silence(self.members[peer].streams)

    def partition(
        self, left: PeerId | Iterable[PeerId], right: PeerId | Iterable[PeerId], *, registry: bool = False
    ) -> None:
        """Cut every link between the two sides. With `registry`, neither side sees what the other publishes now."""
        now = asyncio.get_running_loop().time()
        for a in _each(left):
            for b in _each(right):
                self._cut[_pair(a, b)] = now if registry else None
                self._expect_silence([stream for stream in self.members[a].streams if stream.peer == b])

    def heal(self, *peers: PeerId) -> None:
        """Undo `hang` and `partition` of these peers, or of all. What was held back arrives now."""
        chosen = peers or tuple(self.members)
        for peer in chosen:
            self._hung.pop(peer, None)
        for pair in [pair for pair in self._cut if pair[0] in chosen or pair[1] in chosen]:
            del self._cut[pair]
        for peer in chosen:
            for stream in list(self.members[peer].streams):
                stream.resume()

    def reachable(self, a: PeerId, b: PeerId) -> bool:
        """Whether anything sent between the two arrives now."""
        if not self._hung and not self._cut:
            return True
        return a not in self._hung and b not in self._hung and _pair(a, b) not in self._cut

    def hidden_since(self, reader: PeerId, writer: PeerId) -> float | None:
        """When the registry was parted between these two, if it is."""
        return self._cut.get(_pair(reader, writer)) if self._cut else None

    def is_hung(self, peer: PeerId) -> bool:
        return peer in self._hung

    def wire(self, source: PeerId, target: PeerId) -> "Wire":
        """The one wire that all streams in this direction share."""
        wire = self._wires.get((source, target))
        if wire is None:
            link = LOOPBACK if source == target else self._links(source, target)
            wire = self._wires[source, target] = Wire(link, self.rng)
        return wire

    def wire_bytes(self, frame_bytes: int) -> float:
        """What a frame weighs on a link: its rows as wide as those of the model that is meant."""
        return frame_bytes + max(0, frame_bytes - HEADER_BYTES) * (self.row_scale - 1.0)

    def _expect_silence(self, streams: Iterable["SimStream"]) -> None:
        loop = asyncio.get_running_loop()
        for stream in streams:
            loop.call_later(KEEPALIVE_S, stream.give_up_if_silent)


def _each(peers: PeerId | Iterable[PeerId]) -> tuple[PeerId, ...]:
    return (PeerId(peers),) if isinstance(peers, str) else tuple(peers)


def _pair(a: PeerId, b: PeerId) -> tuple[PeerId, PeerId]:
    return (a, b) if a <= b else (b, a)


class SimRegistry:
    """Who published what, and what a reader a little behind would see."""

    def __init__(self, stale_s: float) -> None:
        self.stale_s = stale_s
        self._topics: dict[str, dict[PeerId, deque[tuple[float, Published]]]] = {}  # (stored at, what), oldest first

    def store(self, topic: str, entry: Published, now: float) -> bool:
        """Take in an entry and forget what has expired. False for one that has expired already."""
        if entry.expires_at <= now:
            return False
        versions = self._topics.setdefault(topic, {}).setdefault(entry.peer, deque())
        versions.append((now, entry))
        oldest = now - self.stale_s - MAX_LEASE_S  # nobody sees farther back, however long the registry is parted
        while versions[0][1].expires_at <= now or (len(versions) > 1 and versions[1][0] < oldest):
            versions.popleft()
        return True

    def read(self, topic: str, now: float, seen_at: Callable[[PeerId], float]) -> dict[PeerId, Published]:
        """The live values as they stood at the time that `seen_at` gives for each writer."""
        entries = self._topics.get(topic)
        if entries is None:
            return {}
        found: dict[PeerId, Published] = {}
        expired = []
        for peer, versions in entries.items():
            if versions[-1][1].expires_at <= now:
                expired.append(peer)
                continue
            moment = seen_at(peer)
            visible = next((entry for stored_at, entry in reversed(versions) if stored_at <= moment), None)
            if visible is not None and visible.expires_at > now:
                found[peer] = visible
        for peer in expired:
            del entries[peer]
        return found


class SimNetwork:
    """One member's `Network`. `name` is for people and for `restart`."""

    def __init__(self, swarm: SimSwarm, peer_id: PeerId, name: str, listen: bool) -> None:
        number = len(swarm.members)
        self.number = number
        self.skew_s = 0.0
        """How far this member's clock is ahead."""
        self.tongue: Callable[[str, bytes], bytes] | None = None
        """What turns the truth into what this member publishes: (topic, value) -> value. Liars have one."""
        self.connects = 0
        address = f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4001"
        self.swarm = swarm
        self.name = name
        self.listen = listen
        self.streams: dict[SimStream, None] = {}
        self.failed = asyncio.Event()
        self._peer_id = peer_id
        self._contact = Contact(peer=peer_id, addresses=(address,) if listen else ())
        self._handlers: dict[str, Handler] = {}
        self._tasks = TaskSet()
        self._down: str | None = None
        self._last_expiry: dict[str, float] = {}
        self.loop = asyncio.get_running_loop()
        self._clock = self.loop.time

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def contact(self) -> Contact:
        return self._contact

    @property
    def multiaddr(self) -> str:
        """What others pass to `join`."""
        return f"{self._contact.addresses[0]}/p2p/{self._peer_id}" if self._contact.addresses else ""

    def now(self) -> float:
        return self._clock() + self.skew_s

    async def join(self, addresses: Sequence[str]) -> None:
        self._check()
        contacts = [contact for contact in map(parse_multiaddr, addresses) if contact.peer != self._peer_id]
        if not contacts:
            return
        await asyncio.sleep(self.swarm.lookup_s)
        self._check()
        for contact in contacts:
            member = self.swarm.members.get(PeerId(contact.peer))
            if member is not None and member.answers and self.swarm.reachable(self._peer_id, member.peer_id):
                return
        await asyncio.sleep(LOOKUP_TIMEOUT_S)
        raise SwarmUnreachableError(
            f"none of these peers answers: {', '.join(addresses)}",
            hint="check that one of them runs and that its port is open",
        )

    def serve(self, protocol: str, handler: Handler) -> None:
        self._handlers[protocol] = handler

    @property
    def answers(self) -> bool:
        """Whether somebody who dials this member finds it."""
        return self._down is None and self.listen

    async def connect(self, contact: Contact, protocol: str) -> Stream:
        self._check()
        self.connects += 1
        peer = PeerId(contact.peer)
        if not self.swarm.reachable(self._peer_id, peer):
            await asyncio.sleep(CONNECT_TIMEOUT_S)
            raise ConnectionLostError(peer, "does not answer")
        await asyncio.sleep(self.swarm.wire(self._peer_id, peer).delay_s())
        member = self.swarm.members.get(peer)
        there = self.swarm.wire(peer, self._peer_id)
        self._check()
        stream = None if member is None else member.accept(self, protocol)
        try:
            await asyncio.sleep(there.delay_s())
        except asyncio.CancelledError:
            if stream is not None:
                await stream.close()
            raise
        self._check()
        if stream is None:
            raise ConnectionLostError(peer, f"cannot be reached, or does not serve {protocol}")
        return stream

    def accept(self, caller: "SimNetwork", protocol: str) -> SimStream | None:
        """The caller's end of a new stream to us, unless we do not answer or do not serve `protocol`."""
        handler = self._handlers.get(protocol)
        if handler is None or self._down is not None or not (self.listen or caller is self):
            return None
        crowded = sum(stream.inbound and stream.peer == caller.peer_id for stream in self.streams)
        theirs = SimStream(caller, self._peer_id, inbound=False)
        ours = SimStream(self, caller.peer_id, inbound=True)
        theirs.other, ours.other = ours, theirs
        if crowded >= MAX_STREAMS_PER_PEER:
            ours.shut("too many streams")
        else:
            self._tasks.spawn(run_handler(handler, ours), name=f"{self.name}: {protocol}")
        return theirs

    async def publish(self, topic: str, value: bytes, lease_s: float) -> bool:
        check_publication(topic, value, lease_s)
        self._check()
        await asyncio.sleep(LOOKUP_TIMEOUT_S if self.swarm.is_hung(self._peer_id) else self.swarm.lookup_s)
        self._check()
        if self.swarm.is_hung(self._peer_id):
            return False
        expires_at = max(self.now() + lease_s, self._last_expiry.get(topic, 0.0) + 1e-6)
        self._last_expiry[topic] = expires_at
        value = bytes(value) if self.tongue is None else self.tongue(topic, bytes(value))
        moment = self._clock()  # the others' clocks are right
        self.swarm.trace.note(moment, self.number, 0, PUBLISHED)
        return self.swarm.registry.store(topic, Published(self._peer_id, value, expires_at), moment)

    async def lookup(self, topic: str) -> dict[PeerId, Published]:
        self._check()
        swarm = self.swarm
        await asyncio.sleep(LOOKUP_TIMEOUT_S if swarm.is_hung(self._peer_id) else swarm.lookup_s)
        self._check()
        if swarm.is_hung(self._peer_id):
            raise SwarmUnreachableError(f"the registry did not answer within {LOOKUP_TIMEOUT_S:g} s")
        true_now = self._clock()
        swarm.trace.note(true_now, self.number, 0, LOOKED_UP)
        moment = true_now - swarm.rng.random() * swarm.registry.stale_s

        def seen_at(writer: PeerId) -> float:
            if writer == self._peer_id:
                return true_now  # a peer always sees its own
            since = swarm.hidden_since(self._peer_id, writer)
            return moment if since is None else min(moment, since)

        return swarm.registry.read(topic, max(true_now, self.now()), seen_at)

    def die(self, reason: str) -> None:
        """End at once: streams, handlers, and every call from now on."""
        if self._down is None:
            self._down = reason
            self.failed.set()
            self._tasks.cancel()
            for stream in list(self.streams):
                stream.shut(reason)

    async def close(self) -> None:
        if self._down is None:
            self._down = "this network is closed"
            await self._tasks.close()
            for stream in list(self.streams):
                stream.shut(self._down)
        await self._tasks.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check(self) -> None:
        if self._down is not None:
            raise ConnectionLostError(self._peer_id, self._down)
