"""What a peer takes of the machine: memory beside its weights, and the time until it serves.

    python -m benchmarks.footprint [--rounds 3]

Memory is the resident size of `python -m llmasos.peer --blocks 0:10` once it has computed a prompt, less its weights
and its kv. The start is compared with what `python -c "import torch, transformers"` takes, in turns, the disk warm.
"""

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

from llmasos.blocks.layers import load_blocks
from llmasos.blocks.registry import resolve
from llmasos.client.async_client import AsyncLLMasOS
from llmasos.local import LocalSwarm
from llmasos.span import Span

PROMPT = "The river had been the city's only road for a thousand years, and it still carried its memory. " * 10
NEW_TOKENS = 16


async def import_s() -> float:
    begin = time.perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import torch, transformers")
    await process.wait()
    return time.perf_counter() - begin


def resident(pid: int) -> int:
    """Bytes, those of files that it shares with other peers of the machine included."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Rss"].split()[0]) * 1024


async def measure(rounds: int) -> None:
    spec = resolve("smollm2")
    blocks = load_blocks(spec, Span(0, 10))
    starts, imports, memory = [], [], []
    for turn in range(rounds + 1):
        took = await import_s()
        async with LocalSwarm() as swarm:
            begin = time.perf_counter()
            peer = await swarm.start_peer("peer", "0:10")
            ready = time.perf_counter() - begin
            await swarm.start_peer("rest", "10:30")
            async with AsyncLLMasOS(swarm.address) as client:
                result = await client.generate(PROMPT, max_new_tokens=NEW_TOKENS)
                kv = (result.prompt_tokens + NEW_TOKENS) * blocks.kv_bytes_per_token
                memory.append(resident(peer.process.pid) - blocks.weight_bytes - kv)
        if turn:
            starts.append(ready)
            imports.append(took)
    ratio = statistics.median(a / b for a, b in zip(starts, imports, strict=True))
    print(f"smollm2, blocks 0:10, {rounds} rounds")
    print(f"  resident memory less {blocks.weight_bytes / 1e6:.0f} MB of weights and kv: {max(memory) / 1e6:.0f} MB")
    print(f"  from start to ready: {statistics.median(starts):.1f} s; import torch, transformers: ", end="")
    print(f"{statistics.median(imports):.1f} s; {ratio:.2f}x")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    asyncio.run(measure(**vars(options.parse_args())))
