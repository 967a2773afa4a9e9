"""`Network` over libp2p and a Kademlia DHT: the real side of the seam.

    p2p_daemon    one p2pd process: connections, encryption, peer identity
    p2p_stream    frames on its streams
    p2p_registry  signed records in the DHT
    p2p_hivemind  what we import of hivemind, and how

All of it lives in the caller's event loop. Nothing here trusts a peer beyond its key: frames, streams per peer,
records and waits are bounded.
"""

import asyncio
import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from llmasos.config import CONNECT_TIMEOUT_S, MAX_STREAMS_PER_PEER, REJOIN_EVERY_S, NetworkConfig
from llmasos.errors import ConnectionLostError, LLMasOSError, SwarmUnreachableError, UsageError, short_id
from llmasos.identity import Identity, claim, public_key_of
from llmasos.multiaddr import is_transport, parse_multiaddr
from llmasos.network import Handler, PeerId, Published, Stream, run_handler
from llmasos.p2p_daemon import Daemon, DaemonError
from llmasos.p2p_hivemind import DHTNode, PeerID, get_dht_time, node_id_of
from llmasos.p2p_registry import Registry, Validator
from llmasos.p2p_stream import FrameStream
from llmasos.tasks import TaskSet
from llmasos.wire import Contact

logger = logging.getLogger(__name__)

RPC_TIMEOUT_S = 1.5
"""A DHT node that has not answered by then is passed over; 3 s is hivemind's default and makes stores slow."""
MAX_RPCS = 64
JOIN_TIMEOUT_S = 10.0
JOIN_RETRY_S = 0.5
WATCH_BOOTSTRAPS_EVERY_S = 5.0
"""How often we look (in memory) whether the DHT still knows the bootstraps; if not, they are asked at once."""
FAREWELL_S = 1.0
"""How long `close` waits for the other ends of streams to hear of it."""
MAX_ADDRESSES = 16


class P2PNetwork:
    """A process's place in a real swarm. Make it with `create`; it joins nobody until `join` is called."""

    def __init__(self, identity: Identity, config: NetworkConfig) -> None:
        self.failed = asyncio.Event()
        self._identity = identity
        self._config = config
        self._contact = Contact(peer=identity.peer_id)
        self._tasks = TaskSet()
        self._releases = contextlib.ExitStack()
        self._handlers: dict[str, Handler] = {}
        self._streams: dict[FrameStream, None] = {}
        self._inbound: dict[PeerId, int] = {}
        self._bootstraps: dict[PeerId, Contact] = {}
        self._closing = False
        self._closed = asyncio.Event()
        self._daemon: Daemon
        self._node: Any
        self._registry: Registry

    @classmethod
    async def create(cls, config: NetworkConfig) -> "P2PNetwork":
        """Start the daemon and listen, if `config.listen`. Raises UsageError for a wrong identity, host or port."""
        identity = Identity.generate() if config.identity is None else Identity.load_or_create(config.identity)
        listen_on = [_listen_multiaddr(config.host, config.port)] if config.listen else []
        self = cls(identity, config)
        if config.identity is not None:
            self._releases.enter_context(claim(config.identity))
        try:
            await self._start(listen_on)
        except BaseException:
            self._releases.close()
            raise
        return self

    async def _start(self, listen_on: Sequence[str]) -> None:
        config, identity = self._config, self._identity
        self._daemon = await Daemon.start(identity, listen_on, self._on_stream)
        try:
            self._contact = Contact(peer=identity.peer_id, addresses=dialable(self._daemon.addresses))
            self._node = await DHTNode.create(
                p2p=self._daemon.p2p,
                node_id=node_id_of(self._daemon.p2p.peer_id),
                client_mode=not config.listen,
                record_validator=Validator(),
                wait_timeout=RPC_TIMEOUT_S,
                parallel_rpc=MAX_RPCS,
                backoff_rate=1.0,  # a node that was away for minutes is not shunned for hours
                # no caches: every look-up is for the latest, and what strangers may store in a cache has no quota
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_size=1,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
            )
        except BaseException:
            await self._daemon.stop()
            raise
        self._registry = Registry(self._node, identity, client=not config.listen)
        self._tasks.spawn(self._watch_daemon(), name="watch the p2p daemon")

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def contact(self) -> Contact:
        return self._contact

    @property
    def multiaddr(self) -> str:
        """What another process passes to `--join`. Empty for one that does not listen."""
        return f"{self._contact.addresses[0]}/p2p/{self.peer_id}" if self._contact.addresses else ""

    def now(self) -> float:
        now: float = get_dht_time()
        return now

    # --- streams ---

    def serve(self, protocol: str, handler: Handler) -> None:
        self._check()
        if self._config.listen and protocol not in self._handlers:
            try:
                self._daemon.register(protocol)
            except DaemonError as error:
                raise LLMasOSError(f"the p2p daemon cannot serve {protocol}: {error}") from error
        self._handlers[protocol] = handler

    async def connect(self, contact: Contact, protocol: str) -> Stream:
        self._check()
        peer = PeerId(contact.peer)
        if peer == self.peer_id:
            return await self._connect_to_self(protocol)
        try:
            public_key_of(peer)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                stream = await self._dial(peer, contact.addresses, protocol)
        except ValueError as error:
            raise ConnectionLostError(peer, f"its id is none: {error}") from error
        except TimeoutError:
            raise ConnectionLostError(peer, f"does not answer within {CONNECT_TIMEOUT_S:g} s") from None
        except DaemonError as error:
            self._check()
            raise ConnectionLostError(peer, f"cannot be reached: {_one_line(error)}") from error
        if self._closing:
            stream.abort()
            self._check()
        self._track(stream)
        return stream

    async def _dial(self, peer: PeerId, addresses: Sequence[str], protocol: str) -> FrameStream:
        known = [address for address in addresses if is_transport(address)]
        refused = None
        if known:
            try:
                await self._daemon.dial(peer, known)
            except DaemonError as error:
                refused = error
        try:
            return await self._daemon.open(peer, protocol)  # it may have moved: the daemon knows other ways to find it
        except DaemonError as error:
            raise refused or error from None  # the second says no more than "dial backoff"

    async def _connect_to_self(self, protocol: str) -> Stream:
        """libp2p refuses to dial itself; a pair of sockets does as well."""
        if protocol not in self._handlers:
            raise ConnectionLostError(self.peer_id, f"does not serve {protocol}")
        loop = asyncio.get_running_loop()
        ends = []
        for end in socket.socketpair():
            _, stream = await loop.create_unix_connection(lambda: FrameStream(greeted=True), sock=end)
            stream.peer, stream.protocol = self.peer_id, protocol
            ends.append(stream)
        self._on_stream(ends[0])
        self._track(ends[1])
        return ends[1]

    def _on_stream(self, stream: FrameStream) -> None:
        """An inbound stream has said whose it is."""
        handler = self._handlers.get(stream.protocol)
        if self._closing or handler is None:
            stream.abort()
            return
        self._track(stream)
        peer = stream.peer
        if self._inbound.get(peer, 0) >= MAX_STREAMS_PER_PEER:
            logger.debug("peer %s has %d streams here: no more", short_id(peer), MAX_STREAMS_PER_PEER)
            stream.shut()
            return
        self._inbound[peer] = self._inbound.get(peer, 0) + 1
        stream.gone.add_done_callback(lambda _: self._forget_inbound(peer))
        self._tasks.spawn(run_handler(handler, stream), name=f"{stream.protocol} for {short_id(peer)}")

    def _track(self, stream: FrameStream) -> None:
        self._streams[stream] = None
        stream.gone.add_done_callback(lambda _: self._streams.pop(stream, None))

    def _forget_inbound(self, peer: PeerId) -> None:
        self._inbound[peer] -= 1
        if not self._inbound[peer]:
            del self._inbound[peer]

    # --- registry ---

    async def publish(self, topic: str, value: bytes, lease_s: float) -> bool:
        self._check()
        stored = await self._registry.publish(topic, value, lease_s)
        self._check()
        return stored

    async def lookup(self, topic: str) -> dict[PeerId, Published]:
        self._check()
        try:
            return await self._registry.lookup(topic)
        finally:
            self._check()  # if it is our own daemon that is gone, say so

    async def join(self, addresses: Sequence[str]) -> None:
        """Meet the peers at these multiaddrs, and again whenever they are lost from sight."""
        self._check()
        contacts = {PeerId(contact.peer): contact for contact in map(parse_multiaddr, addresses)}
        contacts.pop(self.peer_id, None)
        if not contacts:
            return
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not await self._meet(list(contacts.values())):
            self._check()
            if time.monotonic() > deadline - JOIN_RETRY_S:
                raise SwarmUnreachableError(
                    f"none of these peers answers: {', '.join(addresses)}",
                    hint="check that one of them runs, that its port is open, and that its peer id is still the same",
                )
            await asyncio.sleep(JOIN_RETRY_S)
        if not self._bootstraps:
            self._tasks.spawn(self._stay_joined(), name="stay joined")
        self._bootstraps.update(contacts)

    async def _meet(self, contacts: Sequence[Contact]) -> bool:
        """Ask these peers to know us, and then those around us in the DHT. Whether any answered."""
        async with asyncio.TaskGroup() as group:
            greetings = [group.create_task(self._greet(contact)) for contact in contacts]
        if not any(greeting.result() for greeting in greetings):
            return False
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._node.find_nearest_nodes([self._node.node_id])
        except Exception as error:  # whatever hivemind makes of odd answers; those that were greeted know us now
            logger.debug("the search for neighbours ended early: %r", error, exc_info=error)
        return True

    async def _greet(self, contact: Contact) -> bool:
        peer = PeerID.from_base58(contact.peer)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._daemon.dial(PeerId(contact.peer), contact.addresses)
                return await self._node.protocol.call_ping(peer) is not None
        except (TimeoutError, DaemonError) as error:
            logger.debug("bootstrap %s does not answer: %s", short_id(contact.peer), _one_line(error))
            return False

    async def _stay_joined(self) -> None:
        """A restarted bootstrap knows nobody, and the DHT would be in two halves until somebody asks it again."""
        met_at = time.monotonic()
        missing = False
        while not self.failed.is_set():
            await asyncio.sleep(WATCH_BOOTSTRAPS_EVERY_S)
            table = self._node.protocol.routing_table
            lost = any(table.get(peer_id=PeerID.from_base58(peer)) is None for peer in self._bootstraps)
            if not lost and time.monotonic() - met_at < REJOIN_EVERY_S:
                continue
            met = await self._meet(list(self._bootstraps.values()))
            if met:
                met_at = time.monotonic()
            if met == missing:
                missing = not met
                logger.log(
                    logging.WARNING if missing else logging.INFO,
                    "no bootstrap peer answers; the swarm goes on without them" if missing else "bootstrap peers again",
                )

    # --- life ---

    def _check(self) -> None:
        if self._closing:
            raise ConnectionLostError(self.peer_id, "this network is closed")
        if self.failed.is_set():
            raise ConnectionLostError(
                self.peer_id, "our own p2p daemon died", hint="start this process again; its peer id stays the same"
            )

    async def _watch_daemon(self) -> None:
        await self._daemon.died.wait()
        if not self._closing:
            logger.error("our own p2p daemon died: this process has left the swarm")
            self.failed.set()

    async def close(self) -> None:
        if self._closing:
            await self._closed.wait()
            return
        self._closing = True
        try:
            await self._tasks.close()
            streams = list(self._streams)
            for stream in streams:
                stream.shut()
            if streams:
                await asyncio.wait([stream.gone for stream in streams], timeout=FAREWELL_S)
            for stream in list(self._streams):
                stream.abort()
            if not self._daemon.died.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FAREWELL_S):
                        await self._node.shutdown()
        finally:
            self._node.is_alive = False
            await self._daemon.stop()
            self._releases.close()
            self._closed.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _listen_multiaddr(host: str, port: int) -> str:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise UsageError(
            f"{host!r} is not an IP address to listen on", hint="--host 0.0.0.0 listens on every interface"
        ) from None
    if not 0 <= port < 65_536:
        raise UsageError(f"{port} is not a port", hint="--port takes 1 to 65535, or 0 for any free one")
    # libp2p shares a port that another p2pd listens on, and each gets a part of the connections; so look first
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(address), port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {address} port {port}: {error.strerror}",
                hint="choose another one with --host and --port (--port 0 takes any free port)",
            ) from error
    return f"/ip{address.version}/{address}/tcp/{port}"


def dialable(addresses: Sequence[str]) -> tuple[str, ...]:
    """Those that others can dial, the ones that only this machine can last."""
    return tuple(sorted(filter(is_transport, addresses), key=_is_loopback)[:MAX_ADDRESSES])


def _is_loopback(transport: str) -> bool:
    host = transport.split("/")[2]
    return host.startswith("127.") or host == "::1"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
