"""Decoding speed as ratios in one run: transformers alone; one session, and sixteen, through one peer and three.

    python benchmarks/decode.py [--rounds 5] [--prompt-tokens 64] [--new-tokens 128]

Every contestant is a process of its own that lives through the whole run; they take turns, so that a machine whose
speed drifts drifts for all of them. Absolute numbers repeat within a factor of two here; the ratios hold.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

from llmasos.client.async_client import AsyncLLMasOS
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
    answer = {"token_ids": out[0, len(ids):].tolist(), "tokens_per_s": (new_tokens - 1) / (times[-1] - times[1])}
    print(json.dumps(answer), flush=True)
"""

TEXT = "The river had been the city's only road for a thousand years, and it still carried its memory. " * 40

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


async def main(rounds: int, prompt_tokens: int, new_tokens: int) -> None:
    async with LocalSwarm() as one, LocalSwarm() as three:
        await one.start_peers(split_evenly(30, 1))
        await three.start_peers(split_evenly(30, 3))
        async with AsyncLLMasOS(one.address) as to_one, AsyncLLMasOS(three.address) as to_three:
            generator = await to_one.generator("smollm2")
            text = (
                "The river had been the city's only road for a thousand years, and it still carried its memory. " * 20
            )
            ids = (await generator.encode(text))[:prompt_tokens]
            prompt = generator.tokenizer.decode(ids)
            process, transformers = await baseline(str(generator.spec.source.file.path), ids, new_tokens)
            contestants = {
                "transformers": transformers,
                "1 peer": through(to_one, prompt, new_tokens),
                "3 peers": through(to_three, prompt, new_tokens),
                "1 peer x 16": together(to_one, prompt, new_tokens, 16),
                "3 peers x 16": together(to_three, prompt, new_tokens, 16),
            }
            speeds: dict[str, list[float]] = {name: [] for name in contestants}
            tokens: dict[str, list[int]] = {}
            for turn in range(rounds + 1):
                for name, run in contestants.items():
                    tokens[name], speed = await run()
                    if turn:  # the first round warms up
                        speeds[name].append(speed)
            process.terminate()
            await process.wait()
    same = all(found == tokens["transformers"] for found in tokens.values())
    report(speeds, prompt_tokens, new_tokens, same)


def report(speeds: dict[str, list[float]], prompt_tokens: int, new_tokens: int, same: bool) -> None:
    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(speeds[a], speeds[b], strict=True))

    rounds = len(speeds["1 peer"])
    print(f"smollm2, float32, batch 1, {prompt_tokens}-token prompt, {new_tokens} new tokens, {rounds} rounds")
    for name, values in speeds.items():
        print(f"  {name:<13} {statistics.median(values):6.1f} tokens/s   ({min(values):.1f} - {max(values):.1f})")
    print(f"  1 peer / transformers   {ratio('1 peer', 'transformers'):.2f}x")
    print(f"  3 peers / 1 peer        {ratio('3 peers', '1 peer'):.2f}x")
    print(f"  16 sessions through 1 peer, all together / transformers   {ratio('1 peer x 16', 'transformers'):.1f}x")
    print(f"  16 sessions through 3 peers, all together / transformers  {ratio('3 peers x 16', 'transformers'):.1f}x")
    print(f"  all wrote the same tokens: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--prompt-tokens", type=int, default=64)
    options.add_argument("--new-tokens", type=int, default=128)
    asyncio.run(main(**vars(options.parse_args())))
