"""Data parallelism: several prompts at once, each in a session of its own.

Peers run the rows of all sessions in shared passes, and where blocks have several peers the sessions spread over them.

    python examples/batch.py MULTIADDR
"""

import asyncio
import sys
import time

from llmasos import AsyncLLMasOS

PROMPTS = ["The capital of France is", "Water boils at", "The opposite of cold is", "A week has"]


async def main(endpoint: str) -> None:
    """Generate for every prompt, and say how long it took together."""
    async with AsyncLLMasOS(endpoint) as client:
        await client.generate(PROMPTS[0], max_new_tokens=1)  # loads the model's ends
        begin = time.monotonic()
        results = await client.generate_batch(PROMPTS, max_new_tokens=12)
        seconds = time.monotonic() - begin
    for prompt, result in zip(PROMPTS, results, strict=True):
        print(f"{prompt}|{result.text!r}")
    tokens = sum(result.completion_tokens for result in results)
    print(f"{tokens} tokens in {seconds:.1f} s", file=sys.stderr)


asyncio.run(main(sys.argv[1]))
