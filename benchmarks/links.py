"""What links of 50 ms cost, and what pipelining and guessing save of it, as ratios in one run.

    python -m benchmarks.links [--latency 50ms] [--rounds 3] [--new-tokens 48] [--prompt-tokens 2000]
    python -m benchmarks.links --codecs [--bandwidth 10mbit] [--latency 50ms] [--rounds 3] [--prompt-tokens 2000]

Decoding: smollm2 in float32 on three peers, each a process of its own, once as they are and once with that latency
(one way) on every link (`sim/links.py`). A token crosses four links, so there can be no more than 1 / (4 x latency +
compute) tokens a second, where compute is what a token takes on three such peers without the latency. Then guessing
(prompt lookup), each against the same text without: on a text that repeats itself; on noise, in which nothing can be
guessed; and on prose drawn at temperature 1, in which what is guessed is mostly wrong. Contestants take turns, so that
a machine whose speed drifts drifts for all of them.

Prefill: three peers and a client with a libp2p daemon each, in this process, whose blocks take their time without
computing (`sim/runner.py`): stages that are equally long and do not compete for the cores of this machine. The bar is
against the sum of the stages, links left out. With `--real` also smollm2's own blocks, against the processor time of
the peers: on two cores three stages can overlap by a third at most.

Codecs: `--codecs` alone measures the first token of smollm2's own blocks over links of `--bandwidth`, for each codec.
"""

import argparse
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import get_args

import uvloop

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.generation import Generation
from llmasos.config import ClientConfig, Codec, NetworkConfig
from llmasos.network import Network
from llmasos.p2p import P2PNetwork
from llmasos.peer.runner import Speed
from llmasos.span import Span
from sim.links import LinkedNetwork, LinkPlan, Links, parse_bandwidth, parse_latency
from sim.local import LinkedSwarm, LocalSwarm, cpu_s, split_evenly
from sim.runner import from_numbers
from sim.stream import LOOPBACK, Link
from sim.swarm import SimModel
from sim.twin import TwinWork, paced_swarm

PEERS = 3
PROSE = """The lighthouse keeper had kept a diary for thirty-one years, and in all that time he had written only of the
weather, the ships and the price of oil. So when his daughter opened the last volume and found a letter folded into the
back cover, she sat down on the stairs before she read it."""
REPETITIVE = "The dog sat on the mat. The cat sat on the hat. The fox sat on the box. " * 6
STAGE_S = 1.0
"""What one stage of the prefill takes: about that of 10 blocks of smollm2 for 2,000 tokens on one core."""

Run = Callable[[], Awaitable[Generation]]


async def decoding(latency_s: float, rounds: int, new_tokens: int) -> None:
    plan, spans = LinkPlan(Link(latency_s, LOOPBACK.bytes_per_s)), split_evenly(30, PEERS)
    names = [f"peer{number}" for number in range(1, PEERS + 1)]
    async with AsyncExitStack() as stack:
        near_swarm = await stack.enter_async_context(LocalSwarm())
        far_swarm = await stack.enter_async_context(LinkedSwarm(plan, names))
        await near_swarm.start_peers(spans)
        await far_swarm.start_peers(spans)

        async def client_of(swarm: LocalSwarm, speculate: bool) -> AsyncLLMasOS:
            network: Network = await P2PNetwork.create(NetworkConfig(listen=False))
            if swarm is far_swarm:
                network = LinkedNetwork(network, Links(plan.default))
            config = ClientConfig(speculate=speculate)
            return await stack.enter_async_context(AsyncLLMasOS(swarm.address, config=config, network=network))

        near, plain = await client_of(near_swarm, False), await client_of(far_swarm, False)
        guessing = await client_of(far_swarm, True)
        words = random.Random(5)
        generator = await plain.generator("smollm2")
        noise = generator.tokenizer.decode([words.randrange(1_000, 40_000) for _ in range(64)])
        runs: dict[str, Run] = {
            f"prose, {where}": partial(client.generate, PROSE, max_new_tokens=new_tokens)
            for where, client in (("near", near), ("far", plain))
        }
        for client, how in ((plain, "plain"), (guessing, "guessing")):
            for text, prompt, temperature in (
                ("repetitive", REPETITIVE, 0),
                ("random", noise, 1.5),
                ("drawn", PROSE, 1),
            ):
                runs[f"{text}, {how}"] = partial(
                    client.generate, prompt, max_new_tokens=new_tokens, temperature=temperature, seed=11
                )
        found: dict[str, list[Generation]] = {name: [await run()] for name, run in runs.items()}
        for number in range(rounds):
            for name, run in runs.items():
                found[name].append(await run())
            print(f"  round {number + 1} of {rounds}", flush=True)
    speeds = {name: [one.tokens_per_s for one in results[1:]] for name, results in found.items()}
    for name, each in speeds.items():
        print(f"{name:22} {statistics.median(each):7.2f} tokens/s   ({min(each):.2f} - {max(each):.2f})")
    trip_s = (PEERS + 1) * latency_s
    shares = [far * (trip_s + 1 / near) for near, far in zip(speeds["prose, near"], speeds["prose, far"], strict=True)]
    ratio(f"plain decoding / 1 / ({trip_s:g} s + compute)", statistics.median(shares), "at least 0.95")
    for text, bar in (("repetitive", "at least 1.8"), ("random", "at least 0.98"), ("drawn", "at least 0.98")):
        pairs = zip(speeds[f"{text}, guessing"], speeds[f"{text}, plain"], strict=True)
        ratio(f"guessing, {text} text", statistics.median(a / b for a, b in pairs), bar)
        if found[f"{text}, guessing"][0].token_ids != found[f"{text}, plain"][0].token_ids:
            print("  THE TEXTS DIFFER", flush=True)


async def prefill(latency_s: float, tokens: int, rounds: int) -> None:
    """Equal stages that take their time without computing: each row the same, however they are cut into passes."""
    speed = Speed(first_row_s=STAGE_S / tokens, row_s=STAGE_S / tokens)
    spans = [Span(number, number + 1) for number in range(PEERS)]
    work = TwinWork(clients=1, requests=1, prompt_tokens=tokens, new_tokens=1)
    rows = from_numbers(range(1, tokens + 1))
    taken = []
    link = Link(latency_s, LOOPBACK.bytes_per_s)
    async with paced_swarm(SimModel("staged", blocks=PEERS), spans, speed, link) as sessions:
        for _ in range(rounds):
            async with sessions(work) as session:
                begin = time.perf_counter()
                await session.forward(rows)
                taken.append(time.perf_counter() - begin)
    print(f"prefill of {tokens} tokens: {statistics.median(taken):.2f} s, the stages {PEERS} x {STAGE_S:g} s")
    ratio("prefill / sum of the stages", statistics.median(taken) / (PEERS * STAGE_S), "at most 0.5")


async def real_prefill(latency_s: float, tokens: int, rounds: int) -> None:
    """smollm2's own blocks, on the cores of this machine."""
    names = [f"peer{number}" for number in range(1, PEERS + 1)]
    async with LinkedSwarm(LinkPlan(Link(latency_s, LOOPBACK.bytes_per_s)), names) as swarm:
        peers = await swarm.start_peers(split_evenly(30, PEERS))
        async with AsyncLLMasOS(swarm.address, network=await swarm.client_network()) as client:
            generator = await client.generator("smollm2")
            ids = (await generator.encode(PROSE * 40))[:tokens]
            prompt = generator.tokenizer.decode(ids)
            ratios = []
            for number in range(rounds):
                before = sum(cpu_s(peer.process.pid) for peer in peers)
                result = await client.generate(f"{number} {prompt}", max_new_tokens=1)
                stages_s = sum(cpu_s(peer.process.pid) for peer in peers) - before
                ratios.append(result.time_to_first_token_s / stages_s)
    ratio("the same, smollm2 / processor time of its peers", statistics.median(ratios), "no bar")


async def codecs(latency_s: float, bytes_per_s: float, tokens: int, rounds: int) -> None:
    """What a prompt and the tokens behind it take over slow links, in turns; each prompt is a new one."""
    names = [f"peer{number}" for number in range(1, PEERS + 1)]
    async with LinkedSwarm(LinkPlan(Link(latency_s, bytes_per_s)), names) as swarm:
        await swarm.start_peers(split_evenly(30, PEERS))
        found: dict[Codec, list[Generation]] = {codec: [] for codec in get_args(Codec)}
        for number in range(rounds):
            for codec, results in found.items():
                async with AsyncLLMasOS(
                    swarm.address,
                    config=ClientConfig(codec=codec, speculate=False, share_prefixes=False),
                    network=await swarm.client_network(),
                ) as client:
                    generator = await client.generator("smollm2")
                    ids = (await generator.encode(f"{number} {PROSE * 40}"))[:tokens]
                    await client.generate("The links are", max_new_tokens=2)  # everybody has met
                    results.append(await client.generate(generator.tokenizer.decode(ids), max_new_tokens=16))
        for codec, results in found.items():
            first_s = statistics.median(one.time_to_first_token_s for one in results)
            speed = statistics.median(one.tokens_per_s for one in results)
            print(f"{codec:9} first token {first_s:6.2f} s, then {speed:5.2f} tokens/s", flush=True)
        for codec, results in found.items():
            pairs = zip(results, found["exact"], strict=True)
            share = statistics.median(one.time_to_first_token_s / exact.time_to_first_token_s for one, exact in pairs)
            ratio(f"first token of {tokens}, {codec} / exact", share, "no bar")


def ratio(name: str, value: float, bar: str) -> None:
    print(f"{name:48} {value:6.3f}   ({bar})", flush=True)


async def main(
    latency: str, rounds: int, new_tokens: int, prompt_tokens: int, real: bool, codecs_only: bool, bandwidth: str
) -> None:
    latency_s = parse_latency(latency)
    if codecs_only:
        await codecs(latency_s, parse_bandwidth(bandwidth), prompt_tokens, rounds)
        return
    await prefill(latency_s, prompt_tokens, rounds)
    if real:
        await real_prefill(latency_s, prompt_tokens, rounds)
    await decoding(latency_s, rounds, new_tokens)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--latency", default="50ms", help="one way, of every link (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--new-tokens", type=int, default=48)
    options.add_argument("--prompt-tokens", type=int, default=2_000)
    options.add_argument("--real", action="store_true", help="prefill with smollm2's own blocks too")
    options.add_argument("--codecs", action="store_true", dest="codecs_only", help="measure the codecs, nothing else")
    options.add_argument("--bandwidth", default="10mbit", help="of every link, for the codecs (default: %(default)s)")
    uvloop.run(main(**vars(options.parse_args())))
