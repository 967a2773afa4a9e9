"""What a hop costs beyond its compute, over real libp2p on loopback: a chain of peers whose blocks take no time.

    python -m benchmarks.hop [--rounds 400] [--hidden 576]

The runner here returns its input at once. What is left is ours: frames, scheduling, the way through the daemons. The
yardstick is a bare echo of the same bytes over a raw stream, in turns with the chains.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import uvloop

from llmasos.client.router import Router
from llmasos.client.session import Session
from llmasos.config import ClientConfig, DType, NetworkConfig, PeerConfig
from llmasos.network import Stream
from llmasos.p2p import P2PNetwork
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.peer.runner import Chunk, Fault, Speed
from llmasos.routing.directory import Directory
from llmasos.routing.planner import RouteRequest
from llmasos.span import Span
from llmasos.wire import Tensor

HOPS = (1, 3)


class InstantRunner:
    """Blocks that take no time and change nothing."""

    def __init__(self, span: Span, hidden_size: int) -> None:
        self.span = span
        self.hidden_size = hidden_size
        self.dtype: DType = "float32"

    async def run(self, chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        return [chunk.hidden for chunk in chunks]

    async def measure(self) -> Speed:
        return Speed(1e-6, 1e-6)

    def fork(self, source: str, target: str, tokens: int) -> None:
        pass

    def release(self, session: str) -> None:
        pass

    async def close(self) -> None:
        pass


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def node(stack: AsyncExitStack, join: str | None, *, listen: bool = True) -> P2PNetwork:
    network = await stack.enter_async_context(await P2PNetwork.create(NetworkConfig(listen=listen)))
    if join:
        await network.join([join])
    return network


async def chain(stack: AsyncExitStack, hops: int, hidden: int) -> Session:
    """An open session through `hops` peers, each with a network of its own."""
    served, config, first = Served("bench", "bench", hops, 4096), PeerConfig(), ""
    for index in range(hops):
        network = await node(stack, first)
        first = first or network.multiaddr
        runner = InstantRunner(Span(index, index + 1), hidden)
        await stack.enter_async_context(Peer(network, runner, served, config, kv_tokens=4096))
    client = await node(stack, first, listen=False)
    router = Router(client, Directory(client), ClientConfig(), random.Random(1))
    request = RouteRequest(model="bench", digest="bench", model_blocks=hops, kv_tokens=4096, dtype="float32")
    return await stack.enter_async_context(Session(client, router, request, ClientConfig()))


async def main(rounds: int, hidden: int) -> None:
    row = Tensor("float32", (1, hidden), memoryview(bytes(4 * hidden)))
    async with AsyncExitStack() as stack:
        server = await node(stack, None)
        server.serve("echo", echo)
        client = await node(stack, server.multiaddr, listen=False)
        stream = await client.connect(server.contact, "echo")
        sessions = {hops: await chain(stack, hops, hidden) for hops in HOPS}
        times: dict[str, list[float]] = {"echo": [], **{f"{hops} hops": [] for hops in HOPS}}
        for turn in range(rounds):
            begin = time.perf_counter()
            await stream.send(bytes(4 * hidden))
            await stream.receive()
            times["echo"].append(time.perf_counter() - begin)
            for hops, session in sessions.items():
                begin = time.perf_counter()
                await session.forward(row, position=min(turn, 1000))
                times[f"{hops} hops"].append(time.perf_counter() - begin)
    median = {name: 1e3 * statistics.median(values[rounds // 10 :]) for name, values in times.items()}
    print(f"one row of {hidden} float32, {rounds} rounds in turns, medians")
    for name, value in median.items():
        print(f"  {name:<7} {value:.3f} ms")
    further = (median["3 hops"] - median["1 hops"]) / 2
    print(f"  the first hop costs {median['1 hops']:.3f} ms, {median['1 hops'] / median['echo']:.2f}x an echo")
    print(f"  each further hop    {further:.3f} ms, {further / median['echo']:.2f}x an echo")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=400)
    options.add_argument("--hidden", type=int, default=576)
    uvloop.run(main(**vars(options.parse_args())))
