"""python -m sim: swarms to try things on."""

import asyncio
import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from llmasos.console import parser, run, say, set_up_logging, show, stop_signal, subcommand, whole
from llmasos.errors import LLMasOSError
from sim.local import LocalSwarm, split_evenly

if TYPE_CHECKING:
    from llmasos.client.generate import Generation

EXAMPLE = '  python -m sim local --peers 3 --prompt "The world is"'


async def local(args: Namespace) -> None:
    """Start real processes on this machine, generate text through them, stop them."""
    stop = stop_signal()
    work = asyncio.create_task(_local(args))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not work.done():
        say("stopping")
        work.cancel()
    try:
        await work
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _local(args: Namespace) -> None:
    say(f"reading the header of {args.model}")
    from llmasos.blocks.registry import resolve
    from llmasos.client.async_client import AsyncLLMasOS

    spans = split_evenly(resolve(args.model).blocks, args.peers)
    begin = time.monotonic()
    say("starting a bootstrap")
    async with LocalSwarm(model=args.model, show_talk=args.debug) as swarm:
        say(f"  {swarm.address}")
        say(f"starting {len(spans)} peers of {args.model}, each a process of its own: {', '.join(map(str, spans))}")
        for peer in await swarm.start_peers(spans):
            say(f"  {peer.name}  {peer.address}")
        say(f"the swarm is up after {time.monotonic() - begin:.1f} s; generating\n")
        async with AsyncLLMasOS(swarm.address) as client:
            result = await client.generate(args.prompt, args.model, max_new_tokens=args.max_new_tokens)
        show(args.prompt + result.text)
        _report(result, {peer.peer_id: peer.name for peer in swarm.peers.values()})
    say("\nstopped every process. Try next:")
    say("  python -m llmasos.peer --blocks 0:30          # a swarm of your own, of one peer")
    say('  llmasos generate "Once upon a time" --join …  # with the address that it prints')


def _report(result: "Generation", names: dict[str, str]) -> None:
    unknown = [hop.peer for hop in result.route if hop.peer not in names]
    if unknown:
        raise LLMasOSError(f"the route leads through strangers: {', '.join(unknown)}")
    route = " → ".join(f"{names[hop.peer]} (blocks {hop.blocks})" for hop in result.route)
    say(f"\nroute: you → {route} → you")
    say(
        f"{result.completion_tokens} tokens, {result.tokens_per_s:.1f} tokens/s, "
        f"first token after {result.time_to_first_token_s:.2f} s"
    )


def build_parser() -> ArgumentParser:
    """All commands and their options."""
    top = parser("python -m sim", "Swarms to try things on.", EXAMPLE)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = subcommand(commands, "local", "Real processes on this machine, and a text through them.", EXAMPLE)
    command.add_argument("--peers", type=whole(1), default=3, help="how many share the blocks (default: %(default)s)")
    command.add_argument("--model", default="smollm2", help="(default: %(default)s)")
    command.add_argument("--prompt", default="The world is", help="(default: %(default)r)")
    command.add_argument("--max-new-tokens", type=whole(1), default=48, help="(default: %(default)s)")
    return top


def main() -> None:
    """The command line."""
    args = build_parser().parse_args()
    set_up_logging(debug=args.debug)
    run({"local": local}[args.command], args)


if __name__ == "__main__":
    main()
