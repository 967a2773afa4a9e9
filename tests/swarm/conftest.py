"""Real blocks on the simulated network: what a swarm computes, without the cost of processes."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmasos.blocks.layers import DecoderBlocks, load_blocks
from llmasos.blocks.registry import ModelSpec, resolve
from llmasos.client.async_client import AsyncLLMasOS
from llmasos.config import ClientConfig, PeerConfig
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.peer.torch_runner import TorchRunner
from llmasos.span import Span
from sim.network import LOOPBACK, SimSwarm


@cache
def blocks_of(model: str, span: Span) -> DecoderBlocks:
    """Loaded once a run: blocks keep no state between sessions."""
    return load_blocks(resolve(model), span)


@asynccontextmanager
async def torch_swarm(
    spec: ModelSpec, spans: Sequence[str], *, name: str | None = None, config: ClientConfig | None = None
) -> AsyncIterator[tuple[AsyncLLMasOS, list[Peer]]]:
    """A client, and peers with real blocks; `name` is what `resolve` takes, where it is not the spec's own name."""
    world = SimSwarm(seed=11, links=lambda source, target: LOOPBACK)
    served = Served(spec.name, spec.digest, spec.blocks, spec.context_tokens)
    async with AsyncExitStack() as stack:
        peers = []
        for index, span in enumerate(spans):
            place = await stack.enter_async_context(world.network(f"peer{index}"))
            runner = TorchRunner(blocks_of(name or spec.name, Span.parse(span)))
            stack.push_async_callback(runner.close)
            peers.append(await stack.enter_async_context(Peer(place, runner, served, PeerConfig(), kv_tokens=20_000)))
        place = world.network("client", listen=False)
        address = peers[0].network.multiaddr
        yield await stack.enter_async_context(AsyncLLMasOS(address, network=place, config=config)), peers


@pytest.fixture(scope="session")
def smollm2() -> ModelSpec:
    return resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: ModelSpec) -> torch.nn.Module:
    """The same GGUF file, loaded whole by transformers, in float32."""
    path = smollm2.source.file.path
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
