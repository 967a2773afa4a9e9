"""The worlds in which the contract of `Network` is played: memory and virtual time; the same behind injected links;
libp2p and a DHT."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import uvloop

from llmasos.config import NetworkConfig
from llmasos.network import Stream
from llmasos.p2p import P2PNetwork
from sim.links import LinkedNetwork, Links
from sim.network import SimNetwork, SimSwarm
from sim.stream import Link

_numbers = itertools.count()


class World(Protocol):
    a: Any
    b: Any
    protocol: str
    topic: str

    async def network(self, *, listen: bool = True) -> Any:
        """One more peer, which has joined."""

    def kill(self, network: Any) -> None:
        """Its process dies."""


class SimWorld:
    def __init__(self) -> None:
        self.protocol, self.topic = "contract/1", "contract"
        self.swarm = SimSwarm(seed=7)
        self.a, self.b = self.swarm.network("a"), self.swarm.network("b")

    async def network(self, *, listen: bool = True) -> Any:
        return self.swarm.network(f"more {next(_numbers)}", listen=listen)

    def kill(self, network: SimNetwork) -> None:
        self.swarm.kill(network.peer_id)


class LinkedWorld(SimWorld):
    """The same, each member behind links of its own."""

    LINKS = Links(Link(latency_s=0.007, bytes_per_s=50e6))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = self._linked(self.a), self._linked(self.b)

    def _linked(self, network: SimNetwork) -> LinkedNetwork:
        return LinkedNetwork(network, self.LINKS, asyncio.get_running_loop().time)

    async def network(self, *, listen: bool = True) -> Any:
        return self._linked(await super().network(listen=listen))


class P2PWorld:
    """One event loop and two peers for the whole module; further peers live for one scenario."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.a: P2PNetwork = self.runner.run(P2PNetwork.create(NetworkConfig()))
        self.b: P2PNetwork = self.runner.run(P2PNetwork.create(NetworkConfig()))
        self.runner.run(self.b.join([self.a.multiaddr]))
        self.more: list[P2PNetwork] = []

    async def network(self, *, listen: bool = True) -> P2PNetwork:
        self.more.append(await P2PNetwork.create(NetworkConfig(listen=listen)))
        await self.more[-1].join([self.a.multiaddr])
        return self.more[-1]

    def kill(self, network: P2PNetwork) -> None:
        network._daemon._child.kill()

    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        self.protocol, self.topic = f"contract/{next(_numbers)}", f"contract {next(_numbers)}"

        async def guarded() -> None:
            try:
                async with asyncio.timeout(30):
                    await scenario(self)
            finally:
                while self.more:
                    await self.more.pop().close()

        self.runner.run(guarded())

    def close(self) -> None:
        self.runner.run(self.b.close())
        self.runner.run(self.a.close())
        self.runner.close()


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def silent(stream: Stream) -> None:
    await asyncio.Event().wait()


async def open_pair(world: World) -> tuple[Stream, Stream]:
    """A stream from a to b: a's end, and b's end out of its handler, which keeps it open."""
    accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def hand_out(stream: Stream) -> None:
        accepted.put_nowait(stream)
        await asyncio.Event().wait()

    world.b.serve(world.protocol, hand_out)
    ours = await world.a.connect(world.b.contact, world.protocol)
    return ours, await accepted.get()


async def eventually(found: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not await found():  # noqa: ASYNC110 - what others have stored tells nobody when it is there
            await asyncio.sleep(0.05)


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


Play = Callable[[Callable[[World], Awaitable[None]]], None]
