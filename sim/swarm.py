"""A swarm in one process: shipped peers and shipped clients on the simulated seams."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from llmasos.client.router import Policy, Router
from llmasos.client.session import Session
from llmasos.config import ClientConfig, PeerConfig
from llmasos.network import PeerId
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.peer.runner import Speed
from llmasos.routing.directory import Directory
from llmasos.routing.planner import RouteRequest
from llmasos.span import Span
from llmasos.tasks import TaskSet
from sim.network import SimNetwork, SimSwarm, peer_of
from sim.runner import ROW_BYTES, SimRunner

CPU_SPEED = Speed(first_row_s=0.0015, row_s=0.0001)
"""One block of a 135M model on two cores of this year's server, in float32 (docs/log.md)."""


@dataclass(frozen=True, slots=True)
class SimModel:
    """A model that exists only as a number of blocks."""

    name: str = "simulated"
    blocks: int = 12
    context_tokens: int = 8_192
    row_bytes: int = ROW_BYTES

    @property
    def digest(self) -> str:
        """Two models of the simulator are the same when they are equal."""
        return f"{self.name}-{self.blocks}"

    @property
    def served(self) -> Served:
        """What a peer of it serves."""
        return Served(self.name, self.digest, self.blocks, self.context_tokens)

    def request(self, kv_tokens: int, prompt_tokens: int = 1) -> RouteRequest:
        """A route through all of it, for one session that fills `kv_tokens`."""
        return RouteRequest(
            model=self.name,
            digest=self.digest,
            model_blocks=self.blocks,
            prompt_tokens=prompt_tokens,
            new_tokens=max(kv_tokens - prompt_tokens, 1),
            kv_tokens=kv_tokens,
            row_bytes=self.row_bytes,
            dtype="float32",
            quantization="none",
        )


class SimCluster:
    """Peers and clients that come and go. An async context manager: leaving it stops everybody."""

    def __init__(self, world: SimSwarm, model: SimModel, *, config: PeerConfig | None = None) -> None:
        self.world = world
        self.model = model
        self.peers: dict[str, Peer] = {}
        self.config = config or PeerConfig()
        """What each peer is started with, but for its name."""
        self._lives: dict[str, AsyncExitStack] = {}
        self._sweeping = TaskSet()

    async def __aenter__(self) -> "SimCluster":
        return self

    async def __aexit__(self, *reason: object) -> None:
        for name in list(self._lives):
            await self.stop(name)
        await self._sweeping.close()

    async def start(
        self,
        name: str,
        span: str,
        *,
        speed: Speed = CPU_SPEED,
        kv_tokens: int = 65_536,
        network: SimNetwork | None = None,
        after_pass: Callable[[], None] = lambda: None,
    ) -> PeerId:
        """Bring a peer online; `network` is the place of one that was there before."""
        place = network or self.world.network(name)
        life = AsyncExitStack()
        await life.enter_async_context(place)
        runner = SimRunner(Span.parse(span), speed, after_pass=after_pass)
        life.push_async_callback(runner.close)
        config = replace(self.config, name=name)
        peer = Peer(place, runner, self.model.served, config, kv_tokens=kv_tokens)
        self.peers[name] = await life.enter_async_context(peer)
        self._lives[name] = life
        return place.peer_id

    async def stop(self, name: str) -> None:
        """SIGTERM: drain, say goodbye, go."""
        self.peers.pop(name, None)
        await self._lives.pop(name).aclose()

    def adopt(self, name: str, life: AsyncExitStack) -> None:
        """A peer that runs by itself: `life` ends it."""
        self._lives[name] = life

    def kill(self, name: str) -> None:
        """SIGKILL: gone between two instructions. What it leaves behind in this process is swept up behind it."""
        self.peers.pop(name, None)
        self.world.kill(peer_of(name))
        self._sweeping.spawn(self._lives.pop(name).aclose(), f"the end of {name}")

    @asynccontextmanager
    async def client(
        self, name: str, *, seed: int = 0, config: ClientConfig | None = None, policy: Policy | None = None
    ) -> AsyncIterator["SimClient"]:
        """A client with its own view of the swarm; `policy` chooses its routes in the place of ours."""
        async with self.world.network(name, listen=False) as place:
            settings = config or ClientConfig()
            router = Router(place, Directory(place), settings, random.Random(seed), policy=policy)
            try:
                yield SimClient(place, router, settings, self.model)
            finally:
                await router.close()


@dataclass(frozen=True, slots=True)
class SimClient:
    """Opens sessions like a real client; its prompts are numbers."""

    network: SimNetwork
    router: Router
    config: ClientConfig
    model: SimModel

    def session(self, kv_tokens: int = 1_024, prompt_tokens: int = 1) -> Session:
        """A session through all blocks, to be entered with `async with`."""
        return Session(self.network, self.router, self.model.request(kv_tokens, prompt_tokens), self.config)


def names(prefix: str, spans: Sequence[str]) -> list[tuple[str, str]]:
    """`[("peer0", "0:4"), …]` for a list of spans."""
    return [(f"{prefix}{index}", span) for index, span in enumerate(spans)]
