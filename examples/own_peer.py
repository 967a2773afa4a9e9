"""A peer inside a program of your own, and a client beside it.

What is imported here from below `llmasos` is no public interface: it may change with any release.

    python examples/own_peer.py                      # a swarm of its own
    python examples/own_peer.py 10:20 MULTIADDR      # some blocks for the swarm of somebody else
"""

import asyncio
import sys

from llmasos import AsyncLLMasOS
from llmasos.blocks.layers import load_blocks
from llmasos.blocks.registry import resolve
from llmasos.config import NetworkConfig, PeerConfig
from llmasos.p2p import P2PNetwork
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.peer.torch_runner import TorchRunner
from llmasos.span import Span


async def main(span: str = "0:30", *endpoints: str) -> None:
    """Serve `span` of the default model while a text is written."""
    spec = resolve("smollm2")
    served = Served(spec.name, spec.digest, spec.blocks, spec.context_tokens)
    runner = TorchRunner(await asyncio.to_thread(load_blocks, spec, Span.parse(span)))
    async with await P2PNetwork.create(NetworkConfig()) as network:
        await network.join(endpoints)
        async with Peer(network, runner, served, PeerConfig(name="embedded"), kv_tokens=4_096):
            print(f"serving {span} at {network.multiaddr}", file=sys.stderr)
            async with AsyncLLMasOS(network.multiaddr) as client:
                print(await client.generate_text("The world is", max_new_tokens=12))
    await runner.close()


asyncio.run(main(*sys.argv[1:]))
