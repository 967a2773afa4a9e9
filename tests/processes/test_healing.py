"""Peers that choose their blocks themselves keep a real swarm whole."""

import asyncio
import time

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.local import LocalSwarm

PROMPT = "The history of the steam engine begins"


async def blocks(client: AsyncLLMasOS) -> dict[str, str]:
    """The ranges that are online, by the names of their peers."""
    models = (await client.status())["models"]
    peers = models[0]["peers"] if models else []
    return {peer["name"]: peer["blocks"] for peer in peers if peer["state"] == "online"}


async def test_a_range_that_loses_its_only_holder_is_taken_over(swarm: LocalSwarm) -> None:
    """Three peers of half a model each: one half is held once. Its holder is killed; another peer moves there."""
    async with AsyncLLMasOS(swarm.address) as client:
        for name in ("a", "b", "c"):
            await swarm.start_peer(name, "auto", "--max-blocks", "15")
        held = await blocks(client)
        assert set(held.values()) == {"0:15", "15:30"}
        undisturbed = await client.generate(PROMPT, max_new_tokens=12)
        (victim,) = [name for name, span in held.items() if list(held.values()).count(span) == 1]
        await swarm.kill(victim)
        begin = time.monotonic()
        while set((await blocks(client)).values()) != {"0:15", "15:30"} or victim in await blocks(client):
            assert time.monotonic() - begin < 60
            await asyncio.sleep(0.5)
        again = await client.generate(PROMPT, max_new_tokens=12)
        assert again.token_ids == undisturbed.token_ids
