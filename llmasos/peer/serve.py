"""The life of a peer process: load, join, announce, serve, say so."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from shlex import quote

from llmasos.blocks.devices import free_memory_bytes, resolve_device, resolve_dtype
from llmasos.blocks.layers import DecoderBlocks, load_blocks
from llmasos.blocks.registry import ModelSpec, resolve
from llmasos.blocks.tensors import wire_dtype
from llmasos.config import LEASE_S, MAX_AUTO_KV_TOKENS, PeerConfig
from llmasos.console import progress, say, show, stop_signal
from llmasos.errors import UsageError, serve_command
from llmasos.network import Network, Wrap
from llmasos.p2p import P2PNetwork
from llmasos.peer.handler import Served
from llmasos.peer.metrics import PeerMetrics
from llmasos.peer.peer import Peer
from llmasos.peer.resident import Loaded, Resident
from llmasos.peer.runner import Speed
from llmasos.peer.torch_runner import TorchRunner
from llmasos.routing.directory import Directory
from llmasos.routing.placement import choose_span
from llmasos.routing.view import Checkpoint, Numerics, Pool
from llmasos.span import Span, gaps

WEIGHTS_SHARE = 0.5
"""Of the free memory, for weights, under `--blocks auto`; the kv cache takes a quarter (see `_kv_tokens`)."""


async def serve(config: PeerConfig, wrap: Wrap | None = None) -> None:
    """Load, join, announce, and serve until told to stop."""
    stop = stop_signal()
    # 1. What can be wrong without a network is found before anybody hears of us.
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    spec = await asyncio.to_thread(resolve, config.model)
    wanted = None if config.blocks == "auto" else _checked(Span.parse(config.blocks), spec)
    say(f"{spec.name}: {spec.blocks} blocks, hidden {spec.hidden_size}, family {spec.family}")
    direct = await P2PNetwork.create(config.network)
    async with wrap(direct) if wrap is not None else direct as network:
        # 2. Where we serve.
        if config.network.join:
            await network.join(config.network.join)
        directory = Directory(network)
        await directory.refresh(spec.name)
        load = partial(load_blocks, spec, dtype=dtype, device=device, engine=config.engine, quantize=config.quantize)
        rng = random.Random(secrets.randbits(64))
        dtype_name = wire_dtype(dtype)
        if wanted is not None:
            span, speed = wanted, None
        else:
            span, speed = await _choose(directory, spec, network, load, config, dtype_name, rng)
        # 3. Serve there, or wherever we are needed more, until somebody wants us gone or we cannot go on.
        served = Served(spec.name, spec.digest, spec.blocks, spec.context_tokens)
        host = _Host(network, directory, load, config)
        moves = wanted is None and config.network.listen
        resident = Resident(network, served, config, host, directory, rng, moves=moves)
        async with _watched(config, resident, host):
            await resident.live(span, speed, dtype_name, stop)
    say("stopped")


@asynccontextmanager
async def _watched(config: PeerConfig, resident: Resident, host: "_Host") -> AsyncIterator[None]:
    """Count what the peer does, and show it to Prometheus, if that is wanted."""
    if config.metrics_port is None:
        yield
        return
    metrics = resident.watcher = PeerMetrics(lambda: resident.peer)
    async with metrics.serve(config.metrics_host, config.metrics_port) as host.metrics_url:
        yield


class _Host:
    """Loads blocks from the checkpoint, and tells the user what goes on."""

    def __init__(
        self, network: Network, directory: Directory, load: Callable[..., DecoderBlocks], config: PeerConfig
    ) -> None:
        self._network = network
        self._directory = directory
        self._load = load
        self._config = config
        self._blocks: DecoderBlocks
        self._introduced = False
        self.metrics_url = ""

    async def load(self, span: Span) -> Loaded:
        """See `Host.load`."""
        with progress(f"loading blocks {span} of {self._config.model}") as report:
            self._blocks = await asyncio.to_thread(self._load, span, progress=report)
        return Loaded(TorchRunner(self._blocks), self._config.kv_tokens or _kv_tokens(self._blocks))

    async def ready(self, peer: Peer) -> None:
        """See `Host.ready`."""
        await self._directory.refresh(peer.served.model)
        if not self._introduced:
            show(self._network.multiaddr)
            self._introduced = True
        _say_ready(peer, self._blocks, self._directory, self._network.multiaddr, self._config.model)
        if self.metrics_url:
            say(f"  metrics  {self.metrics_url}")

    def leaving(self, going_to: Span | None) -> None:
        """See `Host.leaving`."""
        if going_to is None:
            say("stopping: running sessions move elsewhere or finish, press Ctrl-C again to cut them off")
        else:
            say(f"moving to blocks {going_to}, where the swarm needs this peer more")
            del self._blocks  # before others are loaded


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
    network: Network,
    load: Callable[..., DecoderBlocks],
    config: PeerConfig,
    dtype: str,
    rng: random.Random,
) -> tuple[Span, Speed]:
    """The range that helps the swarm most (`--blocks auto`), for what one block takes here in time and memory."""
    with progress(f"trying one block of {spec.name}") as report:
        block = await asyncio.to_thread(load, Span(0, 1), progress=report)
    room = int(free_memory_bytes(block.device) * WEIGHTS_SHARE / max(block.weight_bytes, 1))
    length = min(config.max_blocks or room, room, spec.blocks)
    runner = TorchRunner(block)
    speed = await runner.measure()
    await runner.close()
    await directory.refresh(spec.name)  # others have chosen meanwhile
    span = choose_span(
        directory.view,
        spec.name,
        spec.blocks,
        length,
        speed.throughput(max(length, 1)),
        network.now(),
        rng,
        digest=spec.digest,
        numerics=Numerics(dtype, config.quantize),
        me=network.peer_id,
    )
    say(f"blocks {span} are what the swarm needs most")
    return span, speed


def _kv_tokens(blocks: DecoderBlocks) -> int:
    """A quarter of the memory that is free, in tokens."""
    room = free_memory_bytes(blocks.device) // 4 // max(blocks.kv_bytes_per_token, 1)
    return max(min(room, MAX_AUTO_KV_TOKENS), 1)


def _say_ready(peer: Peer, blocks: DecoderBlocks, directory: Directory, multiaddr: str, source: str) -> None:
    """What this peer is to the swarm, and what can be done next. `source` is what its model was loaded from."""
    model, spec_blocks = peer.served.model, peer.served.model_blocks
    alike = _alike(peer, blocks, directory)
    missing = gaps(alike, spec_blocks)
    counts = [sum(block in span for span in alike) for block in range(spec_blocks)]
    weakest = min(range(spec_blocks), key=lambda block: counts[block])
    kv = peer.engine.scheduler.kv_tokens
    gib = kv * blocks.kv_bytes_per_token / 2**30
    say(f"peer {peer.network.peer_id} is ready", style="bold green")
    numbers = blocks.dtype if blocks.quantization == "none" else f"{blocks.dtype} with {blocks.quantization} weights"
    say(f"  serves   {model} blocks {blocks.span} of 0:{spec_blocks}, {numbers} on {blocks.device}, {blocks.runs_on}")
    rows_per_s, alone_ms = peer.speed.throughput(len(blocks.span)), 1e3 * peer.speed.first_row_s
    say(f"  speed    {rows_per_s:,.0f} rows/s in full batches; a row alone takes {alone_ms:.2f} ms a block")
    say(f"  room     {kv:,} cached tokens ({gib:.1f} GiB when full)")
    if missing:
        say(f"  swarm    blocks {', '.join(map(str, missing))} have no peer in {numbers} yet:")
        command = serve_command(
            str(missing[0]), source, multiaddr, dtype=blocks.dtype, quantization=blocks.quantization
        )
        say(f"           {command}")
    else:
        say(f"  swarm    every block has a peer in {numbers}; the weakest, block {weakest}, has {counts[weakest]}")
        say(f'  use      llmasos generate "The world is" --model {quote(source)}{_asking(blocks)} --join {multiaddr}')
    say(f"  watch    llmasos status --join {multiaddr}")
    say(f"  stop     Ctrl-C; the swarm knows at once (after a crash: within {LEASE_S:.0f} s)")


def _alike(peer: Peer, blocks: DecoderBlocks, directory: Directory) -> list[Span]:
    """What is served in the numbers of this peer, by itself as well: no route mixes them, so no other completes it."""
    checkpoint = Checkpoint(peer.served.digest, peer.served.model_blocks)
    pool = directory.view.pools(peer.served.model, checkpoint).get(Numerics(blocks.dtype, blocks.quantization), Pool())
    spans = {offer.record.peer: offer.record.span for offer in pool.offers()}
    return list((spans | {peer.network.peer_id: blocks.span}).values())


def _asking(blocks: DecoderBlocks) -> str:
    """The options of a client that is to use these blocks; none where the defaults fit."""
    dtype = f" --dtype {blocks.dtype}" if blocks.dtype != "float32" else ""
    return dtype + (f" --quantization {blocks.quantization}" if blocks.quantization != "none" else "")
