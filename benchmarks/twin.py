"""A real swarm and its simulated twin, calibrated on the spot: by how much the simulator is wrong on this machine.

    python -m benchmarks.twin [--rounds 3] [--clients 1 2] [--prompt-tokens 64] [--new-tokens 24]

Three peers, each a process of its own with one thread, hold the 30 blocks of smollm2 between them. In each round the
workload runs on them; just before and just after, the cost of a pass is measured, and before it the way of a frame
through two libp2p daemons. The twin takes these numbers, the mean of the two costs. The clients send rows and no text,
as the simulator gives the client's own work no time. More clients than there are idle cores compete for them, of which
the simulator knows nothing either: run nothing beside it.
"""

import argparse
import random
import statistics
import time

import torch
import uvloop

from llmasos.blocks.registry import resolve
from llmasos.blocks.tensors import from_torch
from llmasos.client.router import Router
from llmasos.client.session import Session
from llmasos.config import ClientConfig, NetworkConfig
from llmasos.network import Network, Stream
from llmasos.p2p import P2PNetwork
from llmasos.peer.runner import Speed
from llmasos.routing.directory import Directory
from llmasos.routing.planner import RouteRequest
from llmasos.span import Span
from llmasos.wire import ITEM_BYTES, Tensor
from sim.calibrate import calibrate
from sim.local import LocalSwarm
from sim.runner import ROW_BYTES, from_numbers
from sim.stream import Link
from sim.swarm import SimModel
from sim.twin import Measured, TwinWork, drive, simulated

SPANS = [Span(0, 10), Span(10, 20), Span(20, 30)]
MODEL = SimModel("twin", blocks=30)
ECHOES = 200


async def way(network: Network, other: Network, row_bytes: int) -> float:
    """Seconds that a frame of one row takes from one process to another: half of an echo, the median."""

    async def echo(stream: Stream) -> None:
        while True:
            await stream.send(await stream.receive())

    protocol = "twin/echo"
    other.serve(protocol, echo)
    stream = await network.connect(other.contact, protocol)
    taken = []
    for _ in range(ECHOES):
        begin = time.perf_counter()
        await stream.send(bytes(row_bytes))
        await stream.receive()
        taken.append(time.perf_counter() - begin)
    await stream.close()
    return statistics.median(taken) / 2


async def play(work: TwinWork, rounds: int) -> list[tuple[Measured, Speed, float]]:
    """What the clients saw of the real swarm, and what was measured around it."""
    spec = resolve("smollm2")
    row_bytes = spec.hidden_size * ITEM_BYTES["float32"]
    noise = torch.Generator().manual_seed(3)

    def rows(count: int) -> Tensor:
        return from_torch(torch.randn(count, spec.hidden_size, generator=noise))

    request = RouteRequest(
        model=spec.name,
        digest=spec.digest,
        model_blocks=spec.blocks,
        prompt_tokens=work.prompt_tokens,
        new_tokens=work.new_tokens,
        kv_tokens=work.tokens,
        row_bytes=row_bytes,
        dtype="float32",
    )
    found = []
    async with (
        LocalSwarm() as swarm,
        await P2PNetwork.create(NetworkConfig()) as network,
        await P2PNetwork.create(NetworkConfig()) as other,
    ):
        await swarm.start_peers(SPANS)
        await network.join([swarm.address])
        config = ClientConfig()
        router = Router(network, Directory(network), config, random.Random(3))
        for _ in range(rounds):
            before = (await calibrate("smollm2", SPANS[0])).speed
            way_s = await way(network, other, row_bytes)
            seen = await drive(work, lambda: Session(network, router, request, config), rows, time.monotonic)
            after = (await calibrate("smollm2", SPANS[0])).speed
            speed = Speed((before.first_row_s + after.first_row_s) / 2, (before.row_s + after.row_s) / 2)
            found.append((seen, speed, way_s))
        await router.close()
    return found


def main(rounds: int, clients: list[int], prompt_tokens: int, new_tokens: int) -> None:
    row_scale = resolve("smollm2").hidden_size * ITEM_BYTES["float32"] / ROW_BYTES
    for count in clients:
        work = TwinWork(count, 4, prompt_tokens, new_tokens, pause_s=0.1)
        ratios: dict[str, list[float]] = {}
        for seen, speed, way_s in uvloop.run(play(work, rounds)):
            twin = simulated(
                work,
                lambda tokens: from_numbers(range(1, tokens + 1)),
                model=MODEL,
                spans=SPANS,
                speed=speed,
                link=Link(latency_s=way_s, bytes_per_s=1e9, jitter=0.2),
                row_scale=row_scale,
            )
            costs = f"{1e3 * speed.first_row_s:.2f} + {1e3 * speed.row_s:.3f} ms a row and block"
            print(f"  {count} clients: {seen.tokens_per_s:.1f} tokens/s, the twin {twin.tokens_per_s:.1f};", end=" ")
            print(f"{costs}, {1e6 * way_s:.0f} us a way", flush=True)
            for name, value in seen.over(twin).items():
                ratios.setdefault(name, []).append(value)
        for name, values in ratios.items():
            spread = f"{min(values):.2f} - {max(values):.2f}"
            print(f"{count} clients, real / twin, {name:20} {statistics.median(values):6.3f}   ({spread}; 0.75 - 1.25)")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--clients", type=int, nargs="+", default=[1, 2])
    options.add_argument("--prompt-tokens", type=int, default=64)
    options.add_argument("--new-tokens", type=int, default=24)
    main(**vars(options.parse_args()))
