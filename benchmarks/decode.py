"""Decoding speed as ratios in one run: transformers alone; one text, and sixteen, through one peer and three.

    python -m benchmarks.decode [--rounds 5] [--prompt-tokens 64] [--new-tokens 128] [--all]

Every contestant is a process of its own that lives through the whole run; they take turns, so that a machine whose
speed drifts drifts for all of them. Absolute numbers repeat within a factor of two here; the ratios hold. The prompt is
prose and nothing is guessed, but by the contestants that say so. A peer has one thread, as in a local swarm, unless it
says that it has all cores, as the baseline has. `--all` adds the torch engine, and smaller weights.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import torch

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.config import ClientConfig
from sim.local import LocalSwarm, split_evenly

BASELINE = """
import json, sys, time, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
path = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
for line in sys.stdin:
    ids, new_tokens = json.loads(line)
    times = []
    class Clock:
        def put(self, value): times.append(time.perf_counter())
        def end(self): pass
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new_tokens,
                             min_new_tokens=new_tokens, pad_token_id=0, streamer=Clock())
    speed = (new_tokens - 1) / max(times[-1] - times[1], 1e-9)
    print(json.dumps({"token_ids": out[0, len(ids):].tolist(), "tokens_per_s": speed}), flush=True)
"""

PROSE = """The lighthouse keeper had kept a diary for thirty-one years, and in all that time he had written only of the
weather, the ships and the price of oil. So when his daughter opened the last volume and found a letter folded into the
back cover, she sat down on the stairs before she read it. It began with an apology, and it was not addressed to her but
to somebody called Marta, who had, as far as anyone on the island knew, never existed at all."""

Run = Callable[[], Awaitable[tuple[list[int], float]]]  # the tokens, and tokens/s after the first


async def baseline(path: str, ids: list[int], new_tokens: int) -> tuple[asyncio.subprocess.Process, Run]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        BASELINE,
        path,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )

    async def run() -> tuple[list[int], float]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write((json.dumps([ids, new_tokens]) + "\n").encode())
        answer = json.loads(await process.stdout.readline())
        return answer["token_ids"], answer["tokens_per_s"]

    return process, run


def through(client: AsyncLLMasOS, prompt: str, new_tokens: int) -> Run:
    async def run() -> tuple[list[int], float]:
        result = await client.generate(prompt, max_new_tokens=new_tokens)
        return list(result.token_ids), result.tokens_per_s

    return run


def together(client: AsyncLLMasOS, prompt: str, new_tokens: int, sessions: int) -> Run:
    """The tokens of the first of `sessions` at once, and the tokens/s of all, prompts included."""

    async def run() -> tuple[list[int], float]:
        begin = time.perf_counter()
        results = await client.generate_batch([prompt] * sessions, max_new_tokens=new_tokens)
        seconds = time.perf_counter() - begin
        return list(results[0].token_ids), sum(result.completion_tokens for result in results) / seconds

    return run


async def swarm(stack: AsyncExitStack, peers: int, *options: str, threads: int = 1) -> LocalSwarm:
    """That many peers with even spans. They share the cores with each other and the client."""
    started = await stack.enter_async_context(LocalSwarm(threads=threads))
    spans = enumerate(split_evenly(30, peers), start=1)
    await asyncio.gather(*(started.start_peer(f"peer{n}", str(span), *options) for n, span in spans))
    return started


async def plain_client(stack: AsyncExitStack, to: LocalSwarm, **numbers: str) -> AsyncLLMasOS:
    """A client that guesses nothing."""
    config = ClientConfig(speculate=False, **numbers)  # type: ignore[arg-type]
    return await stack.enter_async_context(AsyncLLMasOS(to.address, config=config))


async def main(rounds: int, prompt_tokens: int, new_tokens: int, *, everything: bool) -> None:
    async with AsyncExitStack() as stack:
        one, three = await swarm(stack, 1), await swarm(stack, 3)
        to_one, to_three = await plain_client(stack, one), await plain_client(stack, three)
        guessing, guessing_too = [await stack.enter_async_context(AsyncLLMasOS(each.address)) for each in (one, three)]
        generator = await to_one.generator("smollm2")
        ids = (await generator.encode(PROSE))[:prompt_tokens]
        prompt = generator.tokenizer.decode(ids)
        process, transformers = await baseline(str(generator.spec.source.file.path), ids, new_tokens)
        contestants = {
            "transformers": transformers,
            "1 peer": through(to_one, prompt, new_tokens),
            "3 peers": through(to_three, prompt, new_tokens),
            "1 peer, guessing": through(guessing, prompt, new_tokens),
            "3 peers, guessing": through(guessing_too, prompt, new_tokens),
            "1 peer x 16": together(to_one, prompt, new_tokens, 16),
            "3 peers x 16": together(to_three, prompt, new_tokens, 16),
        }
        if everything:
            on_torch = [await swarm(stack, count, "--engine", "torch") for count in (1, 3)]
            torch_clients = [await plain_client(stack, each) for each in on_torch]
            for count, client in zip((1, 3), torch_clients, strict=True):
                name = f"torch, {count} peer{'s' * (count > 1)}"
                contestants[name] = through(client, prompt, new_tokens)
                contestants[f"{name} x 16"] = together(client, prompt, new_tokens, 16)
            half = await swarm(stack, 1, "--engine", "torch", "--dtype", "bfloat16")
            contestants["torch, bfloat16"] = through(
                await plain_client(stack, half, dtype="bfloat16"), prompt, new_tokens
            )
            for threads, suffix in ((1, ""), (os.cpu_count() or 1, ", all cores")):
                whole = await swarm(stack, 1, threads=threads) if suffix else one
                contestants[f"1 peer{suffix}"] = through(await plain_client(stack, whole), prompt, new_tokens)
                half = await swarm(stack, 1, "--dtype", "bfloat16", threads=threads)
                to_half = await plain_client(stack, half, dtype="bfloat16")
                contestants[f"bfloat16{suffix}"] = through(to_half, prompt, new_tokens)
                for kind in ("int8", "int4"):
                    smaller = await swarm(stack, 1, "--quantize", kind, threads=threads)
                    to_smaller = await plain_client(stack, smaller, quantization=kind)
                    contestants[f"{kind}{suffix}"] = through(to_smaller, prompt, new_tokens)
        speeds, tokens = await take_turns(contestants, rounds)
        process.terminate()
        await process.wait()
    exact = [name for name in tokens if not any(kind in name for kind in INEXACT)]
    different = [name for name in exact if tokens[name] != tokens["transformers"]]
    report(speeds, prompt_tokens, new_tokens, different)


INEXACT = ("bfloat16", "int8", "int4")
"""Whose tokens may differ from those of float32."""


async def take_turns(contestants: dict[str, Run], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    tokens: dict[str, list[int]] = {}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            tokens[name], speed = await run()
            if turn:  # the first round warms up
                speeds[name].append(speed)
    return speeds, tokens


def report(speeds: dict[str, list[float]], prompt_tokens: int, new_tokens: int, different: list[str]) -> None:
    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(speeds[a], speeds[b], strict=True))

    rounds = len(speeds["1 peer"])
    print(f"smollm2, float32, batch 1, {prompt_tokens}-token prompt, {new_tokens} new tokens, {rounds} rounds")
    print(f"  {'':<19} {'tokens/s':>8}   {'lowest - highest':>16}   times transformers")
    for name, values in speeds.items():
        spread = f"{min(values):.1f} - {max(values):.1f}"
        print(f"  {name:<19} {statistics.median(values):8.1f}   {spread:>16}   {ratio(name, 'transformers'):.2f}x")
    print(f"  3 peers / 1 peer: {ratio('3 peers', '1 peer'):.2f}x; ", end="")
    print(f"both guessing: {ratio('3 peers, guessing', '1 peer, guessing'):.2f}x")
    if "torch, 3 peers" in speeds:
        print(f"  3 peers / 1 peer on torch: {ratio('torch, 3 peers', 'torch, 1 peer'):.2f}x")
    print(f"  the same tokens in float32: {'no: ' + ', '.join(different) if different else 'yes'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # this process shares the cores with the peers; the baseline has all of them
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--prompt-tokens", type=int, default=64)
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--all", action="store_true", dest="everything")
    asyncio.run(main(**vars(options.parse_args())))
