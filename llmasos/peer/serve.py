"""The life of a peer process: load, join, announce, serve, say so."""

import asyncio
import random
import secrets
from collections.abc import Callable
from functools import partial

from llmasos.blocks.devices import free_memory_bytes, resolve_device, resolve_dtype
from llmasos.blocks.layers import DecoderBlocks, load_blocks
from llmasos.blocks.registry import ModelSpec, resolve
from llmasos.config import LEASE_S, MAX_AUTO_KV_TOKENS, PeerConfig
from llmasos.console import progress, say, show, stop_signal
from llmasos.errors import LLMasOSError, UsageError
from llmasos.p2p import P2PNetwork
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.peer.torch_runner import TorchRunner
from llmasos.routing.directory import Directory
from llmasos.routing.placement import choose_span
from llmasos.span import Span

WEIGHTS_SHARE = 0.5
"""Of the free memory, for weights, under `--blocks auto`; the kv cache takes a quarter (see `_kv_tokens`)."""


async def serve(config: PeerConfig) -> None:
    """Load, join, announce, and serve until told to stop."""
    stop = stop_signal()
    # 1. What can be wrong without a network is found before anybody hears of us.
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    spec = await asyncio.to_thread(resolve, config.model)
    wanted = None if config.blocks == "auto" else _checked(Span.parse(config.blocks), spec)
    say(f"{spec.name}: {spec.blocks} blocks, hidden {spec.hidden_size}, family {spec.family}")
    async with await P2PNetwork.create(config.network) as network:
        # 2. Where we serve.
        if config.network.join:
            await network.join(config.network.join)
        directory = Directory(network)
        await directory.refresh(spec.name)
        load = partial(load_blocks, spec, dtype=dtype, device=device, engine=config.engine, quantize=config.quantize)
        span = wanted or await _choose(directory, spec, network, load, config.max_blocks)
        # 3. The weights.
        with progress(f"loading blocks {span} of {spec.name}") as report:
            blocks = await asyncio.to_thread(load, span, progress=report)
        runner = TorchRunner(blocks)
        served = Served(spec.name, spec.digest, spec.blocks, spec.context_tokens)
        kv_tokens = config.kv_tokens or _kv_tokens(blocks)
        # 4. Online, until somebody wants us gone or we cannot go on.
        try:
            async with Peer(network, runner, served, config, kv_tokens=kv_tokens) as peer:
                await directory.refresh(spec.name)
                show(network.multiaddr)
                _say_ready(peer, blocks, directory, network.multiaddr)
                await _wait(stop, network, peer)
                say("stopping: running sessions may finish, press Ctrl-C again to cut them off")
        finally:
            await runner.close()
    say("stopped")


def _checked(span: Span, spec: ModelSpec) -> Span:
    if span.end > spec.blocks:
        raise UsageError(
            f"{spec.name} has the blocks 0:{spec.blocks}; {span} reaches beyond them",
            hint=f"try --blocks {min(span.start, spec.blocks - 1)}:{spec.blocks}",
        )
    return span


async def _choose(
    directory: Directory,
    spec: ModelSpec,
    network: P2PNetwork,
    load: Callable[..., DecoderBlocks],
    max_blocks: int | None,
) -> Span:
    """The range that helps the swarm most (`--blocks auto`), for what one block takes here in time and memory."""
    with progress(f"trying one block of {spec.name}") as report:
        block = await asyncio.to_thread(load, Span(0, 1), progress=report)
    room = int(free_memory_bytes(block.device) * WEIGHTS_SHARE / max(block.weight_bytes, 1))
    length = min(max_blocks or room, room, spec.blocks)
    runner = TorchRunner(block)
    speed = await runner.measure()
    await runner.close()
    span = choose_span(
        directory.view,
        spec.name,
        spec.blocks,
        length,
        speed.throughput(max(length, 1)),
        network.now(),
        random.Random(secrets.randbits(64)),
        digest=spec.digest,
        me=network.peer_id,
    )
    say(f"blocks {span} are what the swarm needs most")
    return span


def _kv_tokens(blocks: DecoderBlocks) -> int:
    """A quarter of the memory that is free, in tokens."""
    room = free_memory_bytes(blocks.device) // 4 // max(blocks.kv_bytes_per_token, 1)
    return max(min(room, MAX_AUTO_KV_TOKENS), 1)


async def _wait(stop: asyncio.Event, network: P2PNetwork, peer: Peer) -> None:
    """Until a signal comes; raises when the peer can no longer serve."""
    waits = [
        asyncio.create_task(stop.wait(), name="signal"),
        asyncio.create_task(network.failed.wait(), name="p2p daemon"),
        asyncio.create_task(peer.wait_failed(), name="peer"),
    ]
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in pending:
        wait.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for wait in done:
        wait.result()
    if network.failed.is_set():
        raise LLMasOSError("the p2p daemon of this peer died", hint="start the peer again")


def _say_ready(peer: Peer, blocks: DecoderBlocks, directory: Directory, multiaddr: str) -> None:
    """What this peer is to the swarm, and what can be done next."""
    model, spec_blocks = peer.served.model, peer.served.model_blocks
    coverage = directory.view.coverage(model)
    missing = directory.view.missing(model)
    weakest = min(range(spec_blocks), key=lambda block: coverage[block]) if coverage else 0
    kv = peer.engine.scheduler.kv_tokens
    gib = kv * blocks.kv_bytes_per_token / 2**30
    say(f"peer {peer.network.peer_id} is ready", style="bold green")
    numbers = blocks.dtype if blocks.quantization == "none" else f"{blocks.dtype} with {blocks.quantization} weights"
    say(f"  serves   {model} blocks {blocks.span} of 0:{spec_blocks}, {numbers} on {blocks.device}, {blocks.runs_on}")
    rows_per_s, alone_ms = peer.speed.throughput(len(blocks.span)), 1e3 * peer.speed.first_row_s
    say(f"  speed    {rows_per_s:,.0f} rows/s in full batches; a row alone takes {alone_ms:.2f} ms a block")
    say(f"  room     {kv:,} cached tokens ({gib:.1f} GiB when full)")
    if missing:
        first = missing[0]
        say(f"  swarm    blocks {', '.join(map(str, missing))} have no peer yet:")
        say(f"           python -m llmasos.peer --blocks {first} --model {model} --join {multiaddr}")
    else:
        count = coverage[weakest]
        say(f"  swarm    every block has a peer; the weakest, block {weakest}, has {count}")
        say(f'  use      llmasos generate "The world is" --model {model} --join {multiaddr}')
    say(f"  watch    llmasos status --join {multiaddr}")
    say(f"  stop     Ctrl-C; the swarm knows at once (after a crash: within {LEASE_S:.0f} s)")
