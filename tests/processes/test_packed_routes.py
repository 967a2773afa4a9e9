"""Packed rows between real processes, one of which is killed."""

import asyncio
import signal

import pytest

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.generation import Generation, GenerationRequest
from llmasos.config import ClientConfig, Codec
from sim.local import LocalSwarm

PROMPT = "The history of the steam engine begins " * 20
NEW_TOKENS = 40


@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
async def test_the_text_goes_on_as_it_would_have(codec: Codec) -> None:
    async with LocalSwarm() as swarm:
        spans = {"left": "0:14", "a": "14:30", "b": "14:30"}
        await asyncio.gather(*(swarm.start_peer(name, span) for name, span in spans.items()))
        async with AsyncLLMasOS(swarm.address, config=ClientConfig(codec=codec)) as client:
            undisturbed = await client.generate(PROMPT, max_new_tokens=NEW_TOKENS)
            generator = await client.generator("smollm2")
            ids = await generator.encode(PROMPT)
            pieces: list[str | Generation] = []
            async with client.dialogue("smollm2", len(ids) + NEW_TOKENS) as dialogue:
                async for piece in generator.run(GenerationRequest(PROMPT), dialogue, ids, NEW_TOKENS):
                    pieces.append(piece)
                    if len(pieces) == 10:
                        victim = dialogue.session.route.hops[1].peer
                        next(peer for peer in swarm.peers.values() if peer.peer_id == victim).signal(signal.SIGKILL)
            result = pieces[-1]
            assert isinstance(result, Generation)
            assert (result.failovers, result.token_ids) == (1, undisturbed.token_ids)
