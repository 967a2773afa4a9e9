"""What a prompt costs before its first token, and what it costs others, as ratios in one run.

    python -m benchmarks.prompts [--rounds 5] [--prompt-tokens 512] [--system-tokens 500] [--long-tokens 2000]

1. Time to the first token of a prompt: transformers (a process of its own) and one peer, on
   compiled blocks and on torch, with all cores each; three peers.
2. Two prompts that begin alike: the second's time to its first token, as a share of the first's. Every round has a
   beginning of its own.
3. A text that is being written while another client's long prompt is computed: p95 of the time between its tokens,
   beside what it is alone.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import torch

from benchmarks.decode import PROSE, baseline, swarm
from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.generate import Generator
from llmasos.config import ClientConfig

Times = dict[str, list[float]]


async def tokens_of(generator: Generator, count: int, salt: str) -> str:
    """A prompt of that many tokens that no other salt's begins like."""
    ids = await generator.encode(f"{salt}. " + PROSE * (count // 60 + 1))
    return str(generator.tokenizer.decode(ids[:count]))


async def first_token_s(client: AsyncLLMasOS, prompt: str) -> float:
    return (await client.generate(prompt, max_new_tokens=1)).time_to_first_token_s


async def gaps_s(client: AsyncLLMasOS, prompt: str, enough: Callable[[int], bool]) -> list[float]:
    """Seconds between the tokens of a text, until there are `enough` of them."""
    last, gaps = 0.0, []
    generator = await client.generator("smollm2")
    ids = await generator.encode(prompt)
    async with client.dialogue("smollm2", len(ids) + 2000, new_tokens=2000) as dialogue:
        while not enough(len(gaps)):
            await generator.logits(dialogue, ids, 1)
            ids.append(ids[len(ids) % 50])  # what it says does not matter here
            now = time.perf_counter()
            if last:
                gaps.append(now - last)
            last = now
    return gaps


async def measure(rounds: int, prompt_tokens: int, system_tokens: int, long_tokens: int) -> None:
    async with AsyncExitStack() as stack:
        cores = os.cpu_count() or 1
        one, three = await swarm(stack, 1, threads=cores), await swarm(stack, 3)
        on_torch = await swarm(stack, 1, "--engine", "torch", threads=cores)
        plain, sharing = ClientConfig(share_prefixes=False), ClientConfig()
        to_one = await stack.enter_async_context(AsyncLLMasOS(one.address, config=plain))
        to_three = await stack.enter_async_context(AsyncLLMasOS(three.address, config=plain))
        to_torch = await stack.enter_async_context(AsyncLLMasOS(on_torch.address, config=plain))
        other = await stack.enter_async_context(AsyncLLMasOS(one.address, config=plain))
        sharer = await stack.enter_async_context(AsyncLLMasOS(three.address, config=sharing))
        generator = await to_one.generator("smollm2")
        path = str(generator.spec.source.file.path)
        ids = (await generator.encode(await tokens_of(generator, prompt_tokens, "One")))[:prompt_tokens]
        process, transformers = await baseline(path, ids, 1)

        async def alone() -> float:
            begin = time.perf_counter()
            await transformers()
            return time.perf_counter() - begin

        times: Times = {}

        async def note(name: str, seconds: Awaitable[float]) -> None:
            times.setdefault(name, []).append(await seconds)

        for turn in range(rounds + 1):
            prompt = await tokens_of(generator, prompt_tokens, f"Turn {turn}")
            await note("transformers", alone())
            await note("1 peer", first_token_s(to_one, prompt))
            await note("3 peers", first_token_s(to_three, prompt))
            await note("torch", first_token_s(to_torch, prompt))
            system = await tokens_of(generator, system_tokens, f"Rule {turn}")
            await note("first", first_token_s(sharer, system + " What did she read?"))
            await note("second", first_token_s(sharer, system + " And who was Marta, then?"))
            quiet = await gaps_s(to_one, PROSE, lambda count: count >= 40)
            long = asyncio.create_task(first_token_s(other, await tokens_of(generator, long_tokens, f"Long {turn}")))
            beside = await gaps_s(to_one, PROSE, lambda _: long.done())  # noqa: B023 - used in this turn only
            await long
            times.setdefault("gap alone", []).append(p95(quiet))
            times.setdefault("gap beside", []).append(p95(beside))
        process.terminate()
        await process.wait()
    report({name: seconds[1:] for name, seconds in times.items()}, prompt_tokens, system_tokens, long_tokens)


def p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0]


def report(times: Times, prompt_tokens: int, system_tokens: int, long_tokens: int) -> None:
    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    def line(name: str, text: str, against: str | None = None) -> None:
        seconds = times[name]
        spread = f"{1e3 * min(seconds):.0f} - {1e3 * max(seconds):.0f}"
        compared = f"   {ratio(name, against):.2f}x" if against else ""
        print(f"  {text:<34} {1e3 * statistics.median(seconds):7.0f} ms   ({spread}){compared}")

    print(f"smollm2, float32, {len(times['1 peer'])} rounds. First token of a prompt of {prompt_tokens} tokens:")
    line("transformers", "transformers")
    line("1 peer", "1 peer", "transformers")
    line("3 peers", "3 peers", "transformers")
    line("torch", "1 peer on torch", "transformers")
    print(f"Two prompts that share their first {system_tokens} tokens, through 3 peers:")
    line("first", "the first")
    line("second", "the second", "first")
    print(f"p95 between two tokens of a text, while another client's prompt of {long_tokens} tokens is computed:")
    line("gap alone", "alone")
    line("gap beside", "beside it", "gap alone")


if __name__ == "__main__":
    torch.set_num_threads(1)  # this process shares the cores with the peers; the baseline has all of them
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--prompt-tokens", type=int, default=512)
    options.add_argument("--system-tokens", type=int, default=500)
    options.add_argument("--long-tokens", type=int, default=2000)
    asyncio.run(measure(**vars(options.parse_args())))
