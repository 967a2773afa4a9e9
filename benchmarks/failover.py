"""What a generation feels of a fault: how long it stalls, what is replayed, and whether the text is the same.

    python -m benchmarks.failover [--rounds 3] [--prompt-tokens 150] [--at 200] [--new-tokens 80]

A real swarm of processes on this machine: one peer for the first half of smollm2, two for the second. In the middle of
a generation, when its session holds `--at` tokens, the peer of the second half that it uses is killed (SIGKILL), frozen
(SIGSTOP) or asked to stop (SIGTERM). The stall is the longest wait for a token from then on; what the replay took of it
is told apart. After each round the victim is started again.
"""

import argparse
import asyncio
import signal
import statistics
import time
from dataclasses import dataclass

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.generation import Generation, GenerationRequest
from llmasos.config import ClientConfig
from llmasos.local import LocalSwarm

TEXT = "The river had been the city's only road for a thousand years, and it still carried its memory. " * 40
SECOND_HALF = "15:30"
FAULTS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)


@dataclass(frozen=True)
class Felt:
    """One round."""

    stall_s: float
    replay_s: float
    replayed_tokens: int


async def undisturbed(client: AsyncLLMasOS, prompt: str, new_tokens: int) -> tuple[tuple[int, ...], float]:
    """The tokens, and the longest wait for one."""
    result = await client.generate(prompt, max_new_tokens=new_tokens)
    return result.token_ids, 1 / result.tokens_per_s


async def disturbed(
    client: AsyncLLMasOS, swarm: LocalSwarm, prompt: str, new_tokens: int, at: int, fault: signal.Signals
) -> tuple[tuple[int, ...], Felt]:
    generator = await client.generator("smollm2")
    ids = await generator.encode(prompt)
    victim, stall_s, last = None, 0.0, 0.0
    async with client.dialogue("smollm2", len(ids) + new_tokens) as dialogue:
        request = GenerationRequest(prompt, max_new_tokens=new_tokens)
        async for piece in generator.run(request, dialogue, ids, new_tokens):
            now = time.monotonic()
            if victim is not None:
                stall_s, last = max(stall_s, now - last), now
            elif len(dialogue.held) >= at:
                peer_id = dialogue.session.route.hops[1].peer
                victim = next(peer for peer in swarm.peers.values() if peer.peer_id == peer_id)
                last = time.monotonic()
                victim.signal(fault)
            if isinstance(piece, Generation):
                tokens = piece.token_ids
        session = dialogue.session
        felt = Felt(stall_s, session.replay_s, session.replayed_tokens)
    assert victim is not None, "the text ended before the fault"
    if fault is signal.SIGTERM:
        await victim.process.wait()
    else:
        victim.signal(signal.SIGKILL)
        await victim.process.wait()
    await swarm.start_peer(victim.name, SECOND_HALF)
    return tokens, felt


async def main(rounds: int, prompt_tokens: int, at: int, new_tokens: int) -> None:
    # guesses of several tokens at once would hide how long a single one takes
    async with LocalSwarm() as swarm, AsyncLLMasOS(swarm.address, config=ClientConfig(speculate=False)) as client:
        for name, span in (("left", "0:15"), ("a", SECOND_HALF), ("b", SECOND_HALF)):
            await swarm.start_peer(name, span)
        generator = await client.generator("smollm2")
        prompt = generator.tokenizer.decode((await generator.encode(TEXT))[:prompt_tokens])
        expected, _ = await undisturbed(client, prompt, new_tokens)
        _, step_s = await undisturbed(client, prompt, new_tokens)
        print(
            f"smollm2, float32, {prompt_tokens}-token prompt, fault at {at} tokens; a token takes {1e3 * step_s:.0f} ms"
        )
        print(f"{'fault':8} {'stall s':>22} {'replay s':>9} {'without it':>11} {'replayed':>9}  same tokens")
        for fault in FAULTS:
            found: list[Felt] = []
            same = True
            for _ in range(rounds):
                tokens, felt = await disturbed(client, swarm, prompt, new_tokens, at, fault)
                same &= tokens == expected
                found.append(felt)
            stalls = [felt.stall_s for felt in found]
            replay_s = statistics.median(felt.replay_s for felt in found)
            spread = f"{statistics.median(stalls):.2f} ({min(stalls):.2f} - {max(stalls):.2f})"
            rest_s = statistics.median(felt.stall_s - felt.replay_s for felt in found)
            replayed = statistics.median(felt.replayed_tokens for felt in found)
            numbers = f"{spread:>22} {replay_s:>9.2f} {rest_s:>11.2f} {replayed:>9.0f}"
            print(f"{fault.name:8} {numbers}  {'yes' if same else 'NO'}", flush=True)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--prompt-tokens", type=int, default=150)
    options.add_argument("--at", type=int, default=200, help="tokens that the session holds when the fault comes")
    options.add_argument("--new-tokens", type=int, default=80)
    asyncio.run(main(**vars(options.parse_args())))
