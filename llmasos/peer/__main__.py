"""python -m llmasos.peer: serve a range of a model's blocks; prints the multiaddr to join on stdout when ready."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llmasos.config import NetworkConfig, PeerConfig
from llmasos.console import add_log_format, parser, run, say, seconds, set_up_logging, whole
from llmasos.network import Wrap
from llmasos.span import Span

EXAMPLE = """  python -m llmasos.peer --blocks 0:12                                    # start a swarm of your own
  python -m llmasos.peer --blocks 12:30 --join /ip4/…/tcp/…/p2p/12D3Koo…   # join one
  python -m llmasos.peer --blocks auto --model ./my-checkpoint --join …    # serve what the swarm needs most"""


async def serve(args: Namespace, wrap: Wrap | None = None) -> None:
    """Serve until told to stop, on what `wrap` makes of the network."""
    config = _config(args)
    if config.blocks != "auto":
        Span.parse(config.blocks)
    say(f"starting: {config.model}, blocks {config.blocks}")
    # Not above: this is torch, and --help and wrong usage need not wait for it.
    from llmasos.blocks.lean import import_lean

    import_lean()
    from llmasos.peer.serve import serve as serve_blocks

    await serve_blocks(config, wrap)


def _config(args: Namespace) -> PeerConfig:
    return PeerConfig(
        model=args.model,
        blocks=args.blocks,
        name=args.name,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        engine=args.engine,
        max_blocks=args.max_blocks,
        kv_tokens=args.kv_tokens,
        max_batch_tokens=args.max_batch_tokens,
        drain_timeout_s=args.drain_timeout,
        metrics_host=args.metrics_host,
        metrics_port=args.metrics_port,
        network=NetworkConfig(host=args.host, port=args.port, join=tuple(args.join), identity=args.identity),
    )


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
    args.add_argument(
        "--engine",
        default="auto",
        choices=["auto", "torch", "native"],
        help="what runs the blocks: compiled kernels where they fit, else torch (default: %(default)s)",
    )
    args.add_argument("--kv-tokens", type=whole(1), help="room for cached tokens (default: a quarter of free memory)")
    args.add_argument(
        "--max-batch-tokens", type=whole(1), default=PeerConfig().max_batch_tokens, help="rows of one pass"
    )
    args.add_argument("--max-blocks", type=whole(1), help="most blocks that --blocks auto may take")
    args.add_argument(
        "--drain-timeout", type=seconds, default=PeerConfig().drain_timeout_s, metavar="S", help="grace on stopping"
    )
    args.add_argument(
        "--metrics-port", type=whole(0), metavar="PORT", help="show Prometheus what this peer does (default: do not)"
    )
    args.add_argument(
        "--metrics-host",
        default=PeerConfig().metrics_host,
        metavar="HOST",
        help="address to do that on; whoever reaches it may look (default: %(default)s)",
    )
    add_log_format(args)
    return args


def main(arguments: Sequence[str] | None = None, wrap: Wrap | None = None) -> None:
    """The command line; see `serve`."""
    args = build_parser()
    parsed = args.parse_args(arguments)
    if max(parsed.port, parsed.metrics_port or 0) > 65_535:
        args.error("there are no ports above 65535")
    set_up_logging(debug=parsed.debug, form=parsed.log_format)
    run(partial(serve, wrap=wrap), parsed)


if __name__ == "__main__":
    main()
