"""python -m llmasos.peer: serve a range of a model's blocks; prints the multiaddr to join on stdout when ready."""

import asyncio
import random
import secrets
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from llmasos.config import LEASE_S, MAX_AUTO_KV_TOKENS, NetworkConfig, PeerConfig
from llmasos.console import parser, progress, run, say, set_up_logging, show, stop_signal, whole
from llmasos.errors import LLMasOSError, UsageError
from llmasos.p2p import P2PNetwork
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.routing.directory import Directory
from llmasos.routing.placement import choose_span
from llmasos.span import Span

if TYPE_CHECKING:  # torch is imported when there is something to serve: --help and wrong usage take no seconds
    from llmasos.blocks.layers import DecoderBlocks
    from llmasos.blocks.registry import ModelSpec

EXAMPLE = """  python -m llmasos.peer --blocks 0:12                                    # start a swarm of your own
  python -m llmasos.peer --blocks 12:30 --join /ip4/…/tcp/…/p2p/12D3Koo…   # join one
  python -m llmasos.peer --blocks auto --model ./my-checkpoint --join …    # serve what the swarm needs most"""


async def serve(args: Namespace) -> None:
    """Load, join, announce, and serve until told to stop."""
    config = _config(args)
    asked = None if config.blocks == "auto" else Span.parse(config.blocks)
    stop = stop_signal()
    say(f"starting: {config.model}, blocks {config.blocks}")
    from llmasos.blocks.devices import free_memory_bytes, resolve_device, resolve_dtype
    from llmasos.blocks.layers import load_blocks
    from llmasos.blocks.registry import resolve
    from llmasos.peer.torch_runner import TorchRunner

    # 1. What can be wrong without a network is found before anybody hears of us.
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    spec = await asyncio.to_thread(resolve, config.model)
    wanted = None if asked is None else _checked(asked, spec)
    say(f"{spec.name}: {spec.blocks} blocks, hidden {spec.hidden_size}, family {spec.family}")
    async with await P2PNetwork.create(config.network) as network:
        # 2. Where we serve.
        if config.network.join:
            await network.join(config.network.join)
        directory = Directory(network)
        await directory.refresh(spec.name)
        span = wanted or _choose(directory, spec, network.now(), args.max_blocks)
        # 3. The weights.
        with progress(f"loading blocks {span} of {spec.name}") as report:
            blocks = await asyncio.to_thread(load_blocks, spec, span, dtype=dtype, device=device, progress=report)
        runner = TorchRunner(blocks)
        served = Served(spec.name, spec.digest, spec.blocks, spec.context_tokens)
        kv_tokens = config.kv_tokens or _kv_tokens(free_memory_bytes(blocks.device), blocks)
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


def _config(args: Namespace) -> PeerConfig:
    if args.quantize != "none":
        raise UsageError(f"--quantize {args.quantize} is not served by this version", hint="leave it at none")
    return PeerConfig(
        model=args.model,
        blocks=args.blocks,
        name=args.name,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        kv_tokens=args.kv_tokens,
        max_batch_tokens=args.max_batch_tokens,
        drain_timeout_s=args.drain_timeout,
        network=NetworkConfig(host=args.host, port=args.port, join=tuple(args.join), identity=args.identity),
    )


def _checked(span: Span, spec: "ModelSpec") -> Span:
    if span.end > spec.blocks:
        raise UsageError(
            f"{spec.name} has the blocks 0:{spec.blocks}; {span} reaches beyond them",
            hint=f"try --blocks {min(span.start, spec.blocks - 1)}:{spec.blocks}",
        )
    return span


def _choose(directory: Directory, spec: "ModelSpec", now: float, max_blocks: int | None) -> Span:
    """The range that helps the swarm most (`--blocks auto`)."""
    rng = random.Random(secrets.randbits(64))
    most = min(max_blocks or spec.blocks, spec.blocks)
    return choose_span(directory.view, spec.name, spec.blocks, most, throughput=None, now=now, rng=rng)


def _kv_tokens(free_bytes: int, blocks: "DecoderBlocks") -> int:
    """A quarter of the memory that is free, in tokens."""
    room = free_bytes // 4 // max(blocks.kv_bytes_per_token, 1)
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


def _say_ready(peer: Peer, blocks: "DecoderBlocks", directory: Directory, multiaddr: str) -> None:
    """What this peer is to the swarm, and what can be done next."""
    model, spec_blocks = peer.served.model, peer.served.model_blocks
    coverage = directory.view.coverage(model)
    missing = directory.view.missing(model)
    weakest = min(range(spec_blocks), key=lambda block: coverage[block]) if coverage else 0
    kv = peer.engine.scheduler.kv_tokens
    gib = kv * blocks.kv_bytes_per_token / 2**30
    say(f"peer {peer.network.peer_id} is ready", style="bold green")
    say(f"  serves   {model} blocks {blocks.span} of 0:{spec_blocks}, {blocks.dtype} on {blocks.device}")
    say(
        f"  speed    {peer.throughput:,.0f} rows/s in full batches, {1e3 * peer.speed.first_row_s:.2f} ms a block alone"
    )
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


def build_parser() -> ArgumentParser:
    """All options."""
    args = parser("python -m llmasos.peer", "Serve a range of a model's blocks to a swarm.", EXAMPLE)
    args.add_argument("--blocks", required=True, help="half-open range, as in 0:12, or auto")
    args.add_argument("--model", default="smollm2", help="alias, directory, .gguf file or hub id (%(default)s)")
    args.add_argument(
        "--join", action="append", default=[], metavar="MULTIADDR", help="a peer of the swarm; repeatable"
    )
    args.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    args.add_argument("--port", type=whole(0), default=0, help="port to listen on; 0 takes a free one")
    args.add_argument("--identity", type=Path, help="key file; made when it is missing, so that the peer id stays")
    args.add_argument("--name", default="", help="what people call this peer")
    args.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: %(default)s)")
    args.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="(default: %(default)s)"
    )
    args.add_argument("--quantize", default="none", choices=["none", "int8", "int4"], help="(default: %(default)s)")
    args.add_argument("--kv-tokens", type=whole(1), help="room for cached tokens (default: a quarter of free memory)")
    args.add_argument(
        "--max-batch-tokens", type=whole(1), default=PeerConfig().max_batch_tokens, help="rows of one pass"
    )
    args.add_argument("--max-blocks", type=whole(1), help="most blocks that --blocks auto may take")
    args.add_argument("--drain-timeout", type=float, default=PeerConfig().drain_timeout_s, metavar="S", help="seconds")
    args.add_argument("--log-format", default="pretty", choices=["pretty", "json"], help="(default: %(default)s)")
    return args


def main() -> None:
    """The command line."""
    args = build_parser()
    parsed = args.parse_args()
    if parsed.port > 65_535:
        args.error("--port: there are no ports above 65535")
    set_up_logging(debug=parsed.debug, form=parsed.log_format)
    run(serve, parsed)


if __name__ == "__main__":
    main()
