"""`python -m sim local`: real processes on this machine, and what came of it."""

import asyncio
import json
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.console import say, show, stop_signal, subcommand, talk, whole
from llmasos.errors import LLMasOSError, UsageError
from llmasos.local import split_evenly
from llmasos.span import Span, gaps
from sim.links import LinkPlan
from sim.tenths import Tenths

if TYPE_CHECKING:
    from llmasos.client.generation import Generation
    from sim.local import LocalReport, LocalWork

EXAMPLE = """  python -m sim local --peers 3 --prompt "The world is"
  python -m sim local --peers 3 --replicas 2 --clients 4 --requests 20 --kill peer2@5s --restart peer2@9s
  python -m sim local --peers 3 --latency 50ms --link peer1-peer2=120ms,20mbit --requests 4 --speedup"""


def add_local(commands: Any) -> None:
    """The command and its options."""
    command: ArgumentParser = subcommand(
        commands, "local", "Real processes on this machine, and a text through them.", EXAMPLE
    )
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--peers", type=whole(1), default=3, help="how many share the blocks (default: %(default)s)")
    shape.add_argument("--spans", type=_spans, metavar="A:B,…", help="what each peer serves, instead of even parts")
    command.add_argument("--replicas", type=whole(1), default=1, help="peers for each span (default: %(default)s)")
    command.add_argument("--model", default="smollm2", help="(default: %(default)s)")
    texts = command.add_mutually_exclusive_group()
    texts.add_argument("--prompt", default="The world is", help="(default: %(default)r)")
    texts.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, sent in turn")
    command.add_argument("--max-new-tokens", type=whole(1), default=48, help="(default: %(default)s)")
    command.add_argument("--requests", type=whole(1), metavar="N", help="in all (default: one a client or prompt)")
    command.add_argument("--clients", type=whole(1), default=1, help="how many ask at once (default: %(default)s)")
    command.add_argument(
        "--rate", type=_rate, metavar="R", help="requests that fall due in a second (default: when a client is free)"
    )
    command.add_argument("--latency", metavar="TIME", help="of every link, one way: 50ms (default: as it is)")
    command.add_argument("--bandwidth", metavar="RATE", help="of every pair, each way: 100mbit (default: as it is)")
    command.add_argument(
        "--link",
        action="append",
        default=[],
        metavar="A-B=TIME,RATE",
        help="another latency or bandwidth for one pair: peer1-peer2=80ms,20mbit or client-peer1=80ms; repeatable",
    )
    for kind, what in (("kill", "SIGKILL"), ("stop", "stop in good order"), ("restart", "stop if need be, and start")):
        text = f"{what}: peer2@5s is the second peer after five seconds; repeatable"
        command.add_argument(f"--{kind}", action="append", default=[], metavar="PEER@TIME", help=text)
    command.add_argument(
        "--speedup", action="store_true", help="run the same work on one peer and on one peer less, and compare"
    )
    command.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")


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
    # 1. What can be wrong is found before a process is started.
    plan = LinkPlan.parse(args.latency, args.bandwidth, args.link)
    prompts = tuple(_prompts(args))
    say(f"reading the header of {args.model}")
    from llmasos.blocks.registry import resolve
    from sim.local import FAULTS, LocalFault, LocalWork, Speedup

    blocks = (await asyncio.to_thread(resolve, args.model)).blocks
    spans = _checked(args.spans or split_evenly(blocks, args.peers), blocks) * args.replicas
    smaller = _smaller(spans, args.replicas, blocks) if args.speedup else []
    requests = args.requests or max(args.clients, len(prompts))
    faults = tuple(LocalFault.parse(kind, text) for kind in FAULTS for text in getattr(args, kind))
    work = LocalWork(prompts, args.clients, requests, args.max_new_tokens, args.rate, faults)
    work.check(_names(spans))
    plan.check(_names(spans))
    # 2. The run, and those it is compared with.
    demo = requests == 1 and not (faults or args.json or args.speedup)
    report = await _play(args, plan, spans, work, show_text=demo)
    if demo and report.failed:
        raise LLMasOSError(report.errors[0])
    for fewer in smaller:
        say(f"\nthe same work on {_count(fewer)}, undisturbed, to compare with")
        other = await _play(args, plan, fewer, replace(work, faults=()))
        if other.tokens:
            ratio = report.tokens_per_s / other.tokens_per_s
            report.speedups.append(Speedup(len(fewer), other.tokens_per_s, ratio))
    # 3. What came of it.
    if demo:
        say("stopped every process. Try next:")
        say(f"  python -m llmasos.peer --blocks 0:{blocks}          # a swarm of your own, of one peer")
        say('  llmasos generate "Once upon a time" --join …  # with the address that it prints')
        return
    say()
    talk.print(report.table())
    show(json.dumps(report.as_dict()) if args.json else report.summary())
    if report.failed:
        raise LLMasOSError(f"{report.failed} of {report.requests} requests failed: {report.errors[0]}")


async def _play(
    args: Namespace, plan: LinkPlan, spans: Sequence[Span], work: "LocalWork", *, show_text: bool = False
) -> "LocalReport":
    """Start a swarm, run the work on it, stop it."""
    from sim.local import LinkedSwarm, LocalSwarm, run_work

    begin = time.monotonic()
    say("starting a bootstrap")
    made: LocalSwarm
    if plan.plain:
        made = LocalSwarm(model=args.model, show_talk=args.debug)
    else:
        names = _names(spans)
        made = LinkedSwarm(plan.among(names), names, model=args.model, show_talk=args.debug)
    async with made as swarm:
        say(f"  {swarm.address}")
        say(f"starting {_count(spans)} of {args.model}, each a process of its own: {', '.join(map(str, spans))}")
        await swarm.start_peers(spans, ready=lambda peer: say(f"  {peer.name}  {peer.address}"))
        say(f"the swarm is up after {time.monotonic() - begin:.1f} s; generating\n")
        each = None
        if show_text:
            each = _text_of(work.prompts[0], {peer.peer_id: peer.name for peer in swarm.peers.values()})
        done = None if show_text else Tenths("requests")
        report = await run_work(swarm, spans, work, each=each, done=done)
        say("\nstopping every process")
    return report


def _text_of(prompt: str, names: dict[str, str]) -> "Callable[[Generation], None]":
    """Shows a text, and the way that it took."""

    def finished(result: "Generation") -> None:
        show(prompt + result.text)
        unknown = [hop.peer for hop in result.route if hop.peer not in names]
        if unknown:
            raise LLMasOSError(f"the route leads through strangers: {', '.join(unknown)}")
        route = " → ".join(f"{names[hop.peer]} (blocks {hop.blocks})" for hop in result.route)
        say(f"\nroute: you → {route} → you")
        say(
            f"{result.completion_tokens} tokens, {result.tokens_per_s:.1f} tokens/s, "
            f"first token after {result.time_to_first_token_s:.2f} s"
        )

    return finished


def _count(spans: Sequence[Span]) -> str:
    return "one peer" if len(spans) == 1 else f"{len(spans)} peers"


def _names(spans: Sequence[Span]) -> list[str]:
    return [f"peer{number}" for number in range(1, len(spans) + 1)]


def _checked(spans: list[Span], blocks: int) -> list[Span]:
    if beyond := [str(span) for span in spans if span.end > blocks]:
        raise UsageError(f"the model has the blocks 0:{blocks}; {', '.join(beyond)} reaches beyond them")
    if missing := gaps(spans, blocks):
        raise UsageError(f"these spans do not cover the model: nobody has {', '.join(map(str, missing))}")
    return spans


def _smaller(spans: list[Span], replicas: int, blocks: int) -> list[list[Span]]:
    """The swarms to compare with: one peer, and one peer less (without its last replica, or with longer spans)."""
    if len(spans) == 1:
        raise UsageError("one peer is what a speedup is measured against", hint="give --speedup with --peers 2 or more")
    fewer = spans[:-1] if replicas > 1 else split_evenly(blocks, len(spans) - 1)
    alone = [Span(0, blocks)]
    return [alone] if len(fewer) == 1 else [alone, fewer]


def _prompts(args: Namespace) -> list[str]:
    if args.prompts is None:
        return [args.prompt]
    try:
        lines = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"cannot read prompts from {args.prompts}: {why}", hint="give a file with one a line"
        ) from None
    if not lines:
        raise UsageError(f"{args.prompts} holds no prompt", hint="write one a line")
    return lines


def _spans(text: str) -> list[Span]:
    """An argparse type: `0:10,10:20`."""
    try:
        return [Span.parse(part) for part in text.split(",")]
    except UsageError as error:
        raise ArgumentTypeError(error.message) from None


def _rate(text: str) -> float:
    """An argparse type: requests a second."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of requests above zero")
    return value
