"""A swarm and its simulated twin: one workload, driven by one piece of code, measured in the same way.

What differs is what is on the other side of the seams: libp2p daemons or memory, a machine's time or virtual time. The
driver works on sessions and rows, not on text, because the simulator gives the client's own work no time.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from llmasos.client.router import Router
from llmasos.client.session import Session
from llmasos.config import ClientConfig, NetworkConfig, PeerConfig
from llmasos.p2p import P2PNetwork
from llmasos.peer.peer import Peer
from llmasos.peer.runner import Speed
from llmasos.routing.directory import Directory
from llmasos.span import Span
from llmasos.wire import Tensor
from sim.links import LinkedNetwork, Links
from sim.loop import run
from sim.network import SimSwarm
from sim.report import Latency
from sim.runner import SimRunner
from sim.stream import Link
from sim.swarm import SimCluster, SimModel

LOOKUP_S = 0.01
"""A look-up in a hash table of a few peers on one machine."""


@dataclass(frozen=True, slots=True)
class TwinWork:
    """`clients` at once, each with `requests` one after the other: a pause, a prompt, then token by token.

    Pauses are drawn from a seed, up to `pause_s`: clients that are in step with each other would be no workload.
    """

    clients: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    pause_s: float = 0.5

    @property
    def tokens(self) -> int:
        """What a session holds at its end."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """What the clients saw. The first token counts from when a session begins to be opened."""

    tokens_per_s: float
    first_token: Latency
    token: Latency

    def over(self, other: "Measured") -> dict[str, float]:
        """This by the other: throughput, and what the first token and the next ones take."""
        return {
            "tokens/s": self.tokens_per_s / other.tokens_per_s,
            "first token, mean": self.first_token.mean_s / other.first_token.mean_s,
            "next tokens, p50": self.token.p50_s / other.token.p50_s,
            "next tokens, mean": self.token.mean_s / other.token.mean_s,
        }


async def drive(
    work: TwinWork, session: Callable[[], Session], rows: Callable[[int], Tensor], clock: Callable[[], float]
) -> Measured:
    """Play the workload. `session` makes one to be entered, `rows(n)` are n rows of a prompt.

    One session goes before the others, unmeasured: who has never met has keys to exchange, which no twin does.
    """
    async with session() as warm:
        await warm.forward(rows(1))
    first_s: list[float] = []
    token_s: list[float] = []

    async def client(rng: random.Random) -> None:
        for _ in range(work.requests):
            await asyncio.sleep(rng.uniform(0.0, work.pause_s))
            last = clock()
            async with session() as entered:
                row = await entered.forward(rows(work.prompt_tokens))
                first_s.append(clock() - last)
                for _ in range(work.new_tokens - 1):
                    last = clock()
                    row = await entered.forward(row)
                    token_s.append(clock() - last)

    begin = clock()
    async with asyncio.TaskGroup() as group:
        for number in range(work.clients):
            group.create_task(client(random.Random(number)))
    tokens = work.clients * work.requests * work.new_tokens
    return Measured(tokens / (clock() - begin), Latency.of(first_s), Latency.of(token_s))


@asynccontextmanager
async def paced_swarm(
    model: SimModel, spans: Sequence[Span], speed: Speed, link: Link
) -> AsyncIterator[Callable[[TwinWork], Session]]:
    """A client and peers with a libp2p daemon each, in this process, `link` apart; their blocks take the time that
    `speed` says without computing, so that they do not compete for the cores of this machine. What is yielded makes the
    sessions for a workload.
    """
    async with AsyncExitStack() as stack:

        async def place(*, listen: bool) -> LinkedNetwork:
            network = await P2PNetwork.create(NetworkConfig(listen=listen))
            return await stack.enter_async_context(LinkedNetwork(network, Links(link)))

        addresses: list[str] = []
        for span in spans:
            network = await place(listen=True)
            await network.join(addresses)
            runner = SimRunner(span, speed)
            await stack.enter_async_context(Peer(network, runner, model.served, PeerConfig(), kv_tokens=65_536))
            addresses.append(network.multiaddr)
        network = await place(listen=False)
        await network.join(addresses)
        config = ClientConfig()
        router = Router(network, Directory(network), config, random.Random(3))
        stack.push_async_callback(router.close)
        yield lambda work: Session(network, router, model.request(work.tokens, work.prompt_tokens), config)


def simulated(
    work: TwinWork,
    rows: Callable[[int], Tensor],
    *,
    model: SimModel,
    spans: Sequence[Span],
    speed: Speed,
    link: Link,
    row_scale: float = 1.0,
) -> Measured:
    """The twin: the same work on as many simulated peers, in virtual time. For `row_scale`, see `SimSwarm`."""

    async def main() -> Measured:
        lookup_s = LOOKUP_S + 2 * link.latency_s
        world = SimSwarm(links=lambda source, target: link, lookup_s=lookup_s, row_scale=row_scale)
        async with SimCluster(world, model) as cluster:
            for number, span in enumerate(spans, start=1):
                await cluster.start(f"peer{number}", str(span), speed=speed)
            async with cluster.client("client") as client:
                return await drive(
                    work,
                    lambda: client.session(work.tokens, work.prompt_tokens),
                    rows,
                    asyncio.get_running_loop().time,
                )

    return run(main())
