"""Blocks on the compiled kernels against blocks on torch, and against what the memory of this machine allows.

    python -m benchmarks.native                   # smollm2, some minutes
    python -m benchmarks.native --rounds 9 --threads 1

Everything is measured in turns in one process, so that what else the machine does hits all alike; ratios are medians
over the rounds. Absolute numbers drift. The memory limit is the time to read all weights once, at the bandwidth that
the same run measures by summing a large array.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from llmasos.blocks.layers import BlockChunk, DecoderBlocks, load_blocks
from llmasos.blocks.registry import resolve
from llmasos.span import Span

CONTEXT = 128
"""Cached tokens of each session that decodes."""
PASS = 256
"""Rows of one pass of a prompt, as peers schedule it."""
SESSIONS = (1, 4, 16)


def read_bandwidth(threads: int) -> float:
    """Bytes per second, the best of some sweeps over more than any cache holds."""
    parts = [np.ones(128 * 2**20 // 4 // threads, np.float32) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            begin = time.perf_counter()
            list(pool.map(lambda part: part.view(np.int64).max(), parts))
            best = min(best, time.perf_counter() - begin)
    return sum(part.nbytes for part in parts) / best


def decoding(blocks: DecoderBlocks, sessions: int) -> Callable[[], float]:
    """Seconds of one step of that many sessions, the median of a few."""
    caches = [blocks.new_cache() for _ in range(sessions)]
    row = torch.randn(1, blocks.hidden_size).to(blocks.torch_dtype)
    for cache in caches:
        blocks.forward([BlockChunk(cache, blocks.span, 0, row.repeat(CONTEXT, 1))])

    def run() -> float:
        seconds = []
        for _ in range(5):
            chunks = [BlockChunk(cache, blocks.span, CONTEXT, row) for cache in caches]
            begin = time.perf_counter()
            blocks.forward(chunks)
            seconds.append(time.perf_counter() - begin)
            for cache in caches:
                cache.truncate(CONTEXT)
        return statistics.median(seconds)

    return run


def prefill(blocks: DecoderBlocks, tokens: int) -> Callable[[], float]:
    """Seconds of a prompt, in passes of PASS rows."""
    rows = torch.randn(tokens, blocks.hidden_size).to(blocks.torch_dtype)

    def run() -> float:
        cache = blocks.new_cache()
        begin = time.perf_counter()
        for part in rows.split(PASS):
            blocks.forward([BlockChunk(cache, blocks.span, cache.length, part)])
        return time.perf_counter() - begin

    return run


def main(model: str, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    spec = resolve(model)
    span = Span(0, spec.blocks)
    engines = {
        "torch": load_blocks(spec, span, engine="torch"),
        "float32": load_blocks(spec, span, engine="native"),
        "bfloat16": load_blocks(spec, span, engine="native", dtype="bfloat16"),
        "int8": load_blocks(spec, span, quantize="int8"),
        "int4": load_blocks(spec, span, quantize="int4"),
    }
    contests = {f"decode {n:2}": {name: decoding(b, n) for name, b in engines.items()} for n in SESSIONS}
    contests["prefill 512"] = {name: prefill(blocks, 512) for name, blocks in engines.items()}
    seconds: dict[tuple[str, str], list[float]] = {}
    bandwidth = []
    for turn in range(rounds + 1):
        bandwidth.append(read_bandwidth(threads))
        for contest, runs in contests.items():
            for name, run in runs.items():
                took = run()
                if turn:  # the first round warms up
                    seconds.setdefault((contest, name), []).append(took)
    report(spec.name, engines, list(contests), seconds, max(bandwidth), threads)


def report(
    model: str,
    engines: dict[str, DecoderBlocks],
    contests: list[str],
    seconds: dict[tuple[str, str], list[float]],
    bandwidth: float,
    threads: int,
) -> None:
    def ratio(contest: str, slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[contest, slow], seconds[contest, fast], strict=True))

    names = list(engines)
    print(f"{model}, all blocks, {threads} threads, {engines['float32'].runs_on}, {CONTEXT} cached tokens")
    print(f"{'milliseconds':<13}" + "".join(f"{name:>10}" for name in names))
    for contest in contests:
        print(f"  {contest:<11}" + "".join(f"{1e3 * statistics.median(seconds[contest, n]):10.2f}" for n in names))
    print(f"{'times torch':<13}" + "".join(f"{name:>10}" for name in names))
    for contest in contests:
        print(f"  {contest:<11}" + "".join(f"{ratio(contest, 'torch', name):9.2f}x" for name in names))
    print(f"{'times float32':<13}" + "".join(f"{name:>10}" for name in names))
    print(f"  {contests[0]:<11}" + "".join(f"{ratio(contests[0], 'float32', name):9.2f}x" for name in names))
    limits = {name: blocks.weight_bytes / bandwidth for name, blocks in engines.items()}
    shares = {name: limits[name] / min(seconds[contests[0], name]) for name in names}
    print(f"reading the weights once at {bandwidth / 1e9:.1f} GB/s, as a share of the best step of one session")
    print(f"  {'':<11}" + "".join(f"{100 * shares[name]:9.0f}%" for name in names))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    main(**vars(options.parse_args()))
