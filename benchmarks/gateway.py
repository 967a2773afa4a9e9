"""What a gateway's users get together, against one of them alone.

    python -m benchmarks.gateway [--rounds 5] [--clients 8] [--new-tokens 96]

Two swarms of processes on this machine, of one peer and of three, each behind its own `llmasos gateway`. Every client
is an HTTP client of its own; each asks for another text. One of them alone and all at once take turns. The tokens/s of
all at once are those that arrive from the first request's start to the last one's end, prompts included.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.local import LocalSwarm, split_evenly

OPENINGS = ("The harbour", "A letter", "My brother", "Three engineers", "The winter", "An old map", "A garden", "Rain")


@asynccontextmanager
async def gateway(swarm: LocalSwarm) -> AsyncIterator[str]:
    """`llmasos gateway` as a process; its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llmasos", "gateway", "--join", swarm.address, "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(90):
            url = (await process.stdout.readline()).decode().strip()
        yield url
    finally:
        process.terminate()
        await process.wait()


async def tokens_per_s(clients: list[AsyncLLMasOS], new_tokens: int, turn: int) -> float:
    """Of all clients at once, each with another prompt in each turn."""

    async def ask(client: AsyncLLMasOS, opening: str) -> int:
        prompt = f"{opening} of the year {1800 + turn} was what everybody in the town remembered, because"
        return (await client.generate(prompt, max_new_tokens=new_tokens)).completion_tokens

    begin = time.perf_counter()
    counts = await asyncio.gather(*(ask(*each) for each in zip(clients, OPENINGS * len(clients), strict=False)))
    return sum(counts) / (time.perf_counter() - begin)


async def main(rounds: int, clients: int, new_tokens: int) -> None:
    print(f"smollm2, float32, {clients} clients, {new_tokens} new tokens each, {rounds} rounds")
    print(f"  {'':<8} {'one alone':>10} {'all at once':>12}   ratio (lowest - highest)")
    async with AsyncExitStack() as stack:
        connected: dict[int, list[AsyncLLMasOS]] = {}
        for peers in (1, 3):
            swarm = await stack.enter_async_context(LocalSwarm())
            spans = enumerate(split_evenly(30, peers))
            await asyncio.gather(*(swarm.start_peer(f"peer{n}", str(span)) for n, span in spans))
            url = await stack.enter_async_context(gateway(swarm))
            connected[peers] = [await stack.enter_async_context(AsyncLLMasOS(url)) for _ in range(clients)]
        found: dict[int, list[tuple[float, float]]] = {peers: [] for peers in connected}
        for turn in range(rounds + 1):
            for peers, each in connected.items():
                alone = await tokens_per_s(each[:1], new_tokens, turn)
                together = await tokens_per_s(each, new_tokens, turn)
                if turn:  # the first round warms up
                    found[peers].append((alone, together))
    for peers, speeds in found.items():
        ratios = [together / alone for alone, together in speeds]
        alone, together = (statistics.median(column) for column in zip(*speeds, strict=True))
        name = f"{peers} peer{'s' * (peers > 1)}"
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"  {name:<8} {alone:>10.1f} {together:>12.1f}   {spread}")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--new-tokens", type=int, default=96)
    asyncio.run(main(**vars(options.parse_args())))
