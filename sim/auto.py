"""Peers in virtual time that choose their blocks themselves (`--blocks auto`), and move."""

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from llmasos.peer.peer import Peer
from llmasos.peer.resident import Loaded, Resident
from llmasos.peer.runner import Speed
from llmasos.routing.directory import Directory
from llmasos.routing.placement import choose_span
from llmasos.span import Span
from sim.network import SimNetwork
from sim.runner import SimRunner
from sim.swarm import CPU_SPEED, SimCluster


@dataclass
class AutoPeer:
    """One of them. `spans` lists where it has served, with the times (virtual seconds) at which it came online.

    `came` hears when it is online, `went` when it leaves its span, and for where; `broke` what ended its life early.
    """

    cluster: SimCluster
    name: str
    max_blocks: int
    seed: int
    speed: Speed = CPU_SPEED
    kv_tokens: int = 65_536
    load_s: float = 5.0
    after_pass: Callable[[], None] = lambda: None
    came: Callable[[Span], None] = lambda span: None
    went: Callable[[Span | None], None] = lambda going_to: None
    broke: Callable[[BaseException], None] = lambda error: None

    def __post_init__(self) -> None:
        self.spans: list[tuple[float, Span]] = []
        self._stop = asyncio.Event()
        self._peer: Peer | None = None

    async def start(self, network: SimNetwork | None = None) -> None:
        """Begin to live; returns at once. `network` is the place of one that was there before."""
        place = network or self.cluster.world.network(self.name)
        life = AsyncExitStack()
        await life.enter_async_context(place)
        task = asyncio.create_task(self._live(place), name=f"life of {self.name}")
        task.add_done_callback(self._ended)
        life.push_async_callback(self._end, task)
        self.cluster.adopt(self.name, life)

    async def _end(self, task: asyncio.Task[None]) -> None:
        self._stop.set()
        await asyncio.wait([task])

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.broke(error)

    async def _live(self, network: SimNetwork) -> None:
        model, rng = self.cluster.model, random.Random(self.seed)
        directory = Directory(network)
        await directory.refresh(model.name)
        throughput = self.speed.throughput(self.max_blocks)
        span = choose_span(
            directory.view,
            model.name,
            model.blocks,
            self.max_blocks,
            throughput,
            network.now(),
            rng,
            digest=model.digest,
            me=network.peer_id,
        )
        config = replace(self.cluster.config, name=self.name)
        resident = Resident(network, model.served, config, self, directory, rng, moves=True)
        await resident.live(span, self.speed, "float32", self._stop)

    # --- the host of its peers ----------------------------------------------------------------------------------------

    async def load(self, span: Span) -> Loaded:
        """See `Host.load`."""
        await asyncio.sleep(self.load_s)
        return Loaded(SimRunner(span, self.speed, after_pass=self.after_pass), self.kv_tokens)

    async def ready(self, peer: Peer) -> None:
        """See `Host.ready`."""
        self._peer = peer
        self.cluster.peers[self.name] = peer
        self.spans.append((asyncio.get_running_loop().time(), peer.runner.span))
        self.came(peer.runner.span)

    def leaving(self, going_to: Span | None) -> None:
        """See `Host.leaving`."""
        self.went(going_to)
        if self.cluster.peers.get(self.name) is self._peer:
            del self.cluster.peers[self.name]
