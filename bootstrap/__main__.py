"""python -m bootstrap: run a bootstrap; prints its multiaddr on stdout when it is ready."""

import asyncio
from argparse import ArgumentParser, Namespace
from pathlib import Path

from llmasos.config import NetworkConfig
from llmasos.console import add_log_format, parser, run, say, set_up_logging, show, stop_signal, whole
from llmasos.errors import LLMasOSError
from llmasos.p2p import P2PNetwork


async def serve(args: Namespace) -> None:
    """Be reachable until told to stop."""
    stop = stop_signal()
    config = NetworkConfig(host=args.host, port=args.port, identity=args.identity)
    async with await P2PNetwork.create(config) as network:
        show(network.multiaddr)
        say("bootstrap is ready")
        say(f"  serve   python -m llmasos.peer --blocks 0:12 --join {network.multiaddr}")
        say(f"  watch   llmasos status --join {network.multiaddr}")
        say("  stop    Ctrl-C")
        waits = [asyncio.create_task(stop.wait()), asyncio.create_task(network.failed.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if network.failed.is_set():
            raise LLMasOSError("the p2p daemon of this process died", hint="start it again: python -m bootstrap")


def build_parser() -> ArgumentParser:
    """All options."""
    args = parser(
        "python -m bootstrap",
        "Run a bootstrap: the first address that the peers and clients of a swarm join.",
        "  python -m bootstrap --host 0.0.0.0 --port 31337 --identity ~/.llmasos/bootstrap.key",
    )
    args.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    args.add_argument("--port", type=whole(0), default=0, help="port to listen on; 0 takes a free one")
    args.add_argument("--identity", type=Path, help="key file; made when it is missing, so that the address stays")
    add_log_format(args)
    return args


def main() -> None:
    """The command line."""
    args = build_parser()
    parsed = args.parse_args()
    set_up_logging(debug=parsed.debug, form=parsed.log_format)
    if parsed.port > 65_535:
        args.error("--port: there are no ports above 65535")
    run(serve, parsed)


if __name__ == "__main__":
    main()
