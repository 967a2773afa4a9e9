"""python -m sim: swarms to try things on."""

import asyncio
import json
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmasos.console import QUIET_S, parser, run, say, set_up_logging, show, stop_signal, subcommand, talk, whole
from llmasos.errors import LLMasOSError, UsageError
from llmasos.local import split_evenly
from sim import plot
from sim.baselines import POLICIES
from sim.compare import compare
from sim.compare import draw as draw_comparison
from sim.hunt import Verdict, hunt
from sim.invariants import ViolationError
from sim.scenario import HERE, load, resize, scenarios
from sim.simulation import simulate

if TYPE_CHECKING:
    from llmasos.client.generate import Generation
    from llmasos.span import Span
    from sim.local import LocalReport, LocalWork

COMPARE_EXAMPLE = "  python -m sim compare stragglers --seed 7 --plot stragglers.png"
HUNT_EXAMPLE = "  python -m sim hunt --scenario churn --seeds 1000 --peers 12 --duration 60"
RUN_EXAMPLE = """  python -m sim run churn --peers 100 --seed 7
  python -m sim run sim/scenarios/liars.toml --json > report.json"""
CALIBRATE_EXAMPLE = "  python -m sim calibrate --model smollm2 --blocks 0:10"
EXAMPLE = """  python -m sim local --peers 3 --prompt "The world is"
  python -m sim local --peers 3 --replicas 2 --clients 4 --requests 20 --kill peer2@5s --restart peer2@9s"""


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
    from sim.local import LocalFault, LocalSwarm, LocalWork, run_work

    blocks = resolve(args.model).blocks
    spans = [*(args.spans or split_evenly(blocks, args.peers))] * args.replicas
    faults = [LocalFault.parse("kill", text) for text in args.kill]
    faults += [LocalFault.parse("stop", text) for text in args.stop]
    faults += [LocalFault.parse("restart", text) for text in args.restart]
    prompts = tuple(_prompts(args))
    requests = args.requests or max(args.clients, len(prompts))
    work = LocalWork(prompts, args.clients, requests, args.max_new_tokens, tuple(faults))
    demo = requests == 1 and not faults and not args.json
    begin = time.monotonic()
    say("starting a bootstrap")
    async with LocalSwarm(model=args.model, show_talk=args.debug) as swarm:
        say(f"  {swarm.address}")
        say(f"starting {len(spans)} peers of {args.model}, each a process of its own: {', '.join(map(str, spans))}")
        for peer in await swarm.start_peers(spans):
            say(f"  {peer.name}  {peer.address}")
        names = {peer.peer_id: peer.name for peer in swarm.peers.values()}
        say(f"the swarm is up after {time.monotonic() - begin:.1f} s; generating\n")

        def finished(result: "Generation") -> None:
            if demo:
                show(prompts[0] + result.text)
                _report(result, names)

        report = await run_work(swarm, spans, work, each=finished)
    if not demo:
        talk.print(report.table())
    if demo and report.failed:
        raise LLMasOSError(report.errors[0])
    single = await _single(args, blocks, work) if args.speedup else None
    if single is not None:
        ratio = report.tokens_per_s / single.tokens_per_s
        say(f"one peer alone: {single.tokens_per_s:.1f} tokens/s; speedup T1/Tn = {ratio:.2f} with {len(spans)} peers")
    if args.json:
        show(json.dumps({**report.as_dict(), "single_peer": single.as_dict() if single is not None else None}))
    elif not demo:
        show(f"requests={report.requests} failed={report.failed} tokens_per_s={report.tokens_per_s:.2f}")
    if demo:
        say("\nstopped every process. Try next:")
        say("  python -m llmasos.peer --blocks 0:30          # a swarm of your own, of one peer")
        say('  llmasos generate "Once upon a time" --join …  # with the address that it prints')
    elif report.failed:
        raise LLMasOSError(f"{report.failed} of {report.requests} requests failed: {report.errors[0]}")


async def _single(args: Namespace, blocks: int, work: "LocalWork") -> "LocalReport":
    """The same work on one peer that has all blocks, undisturbed."""
    from llmasos.span import Span
    from sim.local import LocalSwarm, run_work

    say("the same work on one peer with all blocks, for comparison")
    async with LocalSwarm(model=args.model, show_talk=args.debug) as swarm:
        spans = [Span(0, blocks)]
        await swarm.start_peers(spans)
        return await run_work(swarm, spans, replace(work, faults=()))


def _prompts(args: Namespace) -> list[str]:
    if args.prompts is None:
        return [args.prompt]
    try:
        lines = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read prompts from {args.prompts}: {error}") from None
    if not lines:
        raise UsageError(f"{args.prompts} holds no prompt", hint="write one a line")
    return lines


def _spans(text: str) -> list["Span"]:
    """An argparse type: `0:10,10:20`."""
    from llmasos.span import Span

    try:
        return [Span.parse(part) for part in text.split(",")]
    except UsageError as error:
        raise ArgumentTypeError(error.message) from None


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


async def measure_runner(args: Namespace) -> None:
    """The cost model of this machine."""
    from llmasos.span import Span
    from sim.calibrate import calibrate

    span = Span.parse(args.blocks)
    say(f"loading blocks {span} of {args.model}, and timing passes of 1 to 128 rows on one thread")
    found = await calibrate(args.model, span)
    say("sessions  rows   ms a block   the line says")
    for point in found.points:
        say(f"{point.sessions:8}  {point.rows:4}   {1e3 * point.block_s:10.3f}   {1e3 * found.predict(point):10.3f}")
    say(f"the line misses by {found.worst_error:.0%} at most; for a scenario:\n")
    show(found.as_toml())


def list_scenarios(args: Namespace) -> None:
    """The scenarios that come with the simulator."""
    for scenario in scenarios():
        show(f"{scenario.name:16} {scenario.title}")
    say(f"\nThey are files in {HERE}: copy one, change it, and give its path to `python -m sim run`.")


def run_scenario(args: Namespace) -> None:
    """One scenario in virtual time; its report."""
    scenario = resize(load(args.scenario), peers=args.peers, clients=args.clients, duration_s=args.duration)
    if args.plot is not None:
        plot.check(args.plot)
    say(
        f"{scenario.name}: {scenario.peers.count} peers of {scenario.peers.blocks} blocks, {scenario.clients.count} "
        f"clients, {scenario.duration_s:g} s of virtual time, seed {args.seed}"
    )
    report = simulate(
        scenario,
        args.seed,
        source=args.scenario,
        thorough=scenario.peers.count <= THOROUGH_PEERS,
        debug=args.debug,
        progress=Tenths("simulated"),
    )
    if args.json:
        show(json.dumps(report.as_dict()))
    else:
        talk.print(report.table())
        show(report.summary())
    if args.plot is not None:
        plot.draw(report, args.plot)
        say(f"plotted to {args.plot}")
    if report.violations:
        raise ViolationError(report.violations[0], hint=report.replay)


def compare_policies(args: Namespace) -> None:
    """One scenario, once for each policy; a table, and where ours stands."""
    scenario = resize(load(args.scenario), peers=args.peers, clients=args.clients, duration_s=args.duration)
    if args.plot is not None:
        plot.check(args.plot)
    say(f"{scenario.name}, seed {args.seed}, under {len(POLICIES)} policies: {', '.join(POLICIES)}")
    comparison = compare(
        scenario,
        args.seed,
        source=args.scenario,
        processes=args.processes,
        heard=lambda report: say(f"  {report.policy}: {report.tokens_per_s:.1f} tokens/s"),
    )
    talk.print(comparison.table())
    if args.json:
        show(json.dumps([report.as_dict() for report in comparison.reports]))
    else:
        for standing in comparison.standings():
            show(
                f"{scenario.name} {standing.measure}: ours {standing.ours:.4g}, best {standing.best:.4g} "
                f"({standing.who}), ratio {standing.ratio:.3f}"
            )
    if args.plot is not None:
        draw_comparison(comparison, args.plot)
        say(f"plotted to {args.plot}")
    for report in comparison.reports[:1]:
        if report.violations:
            raise ViolationError(report.violations[0], hint=report.replay)


def hunt_seeds(args: Namespace) -> None:
    """Many seeds of one scenario, in parallel; the first that fails, and how to replay it."""
    scenario = resize(load(args.scenario), peers=args.peers, clients=args.clients, duration_s=args.duration)
    seeds = range(args.first, args.first + args.seeds)
    say(f"hunting through {len(seeds)} seeds of {scenario.name}, from {args.first} on")
    begin = time.monotonic()
    told = Tenths("hunted")
    verdicts: list[Verdict] = []

    def heard(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if verdict.problem:
            say(f"  seed {verdict.seed}: {verdict.problem}\n    {verdict.replay}")
        told(len(verdicts) / len(seeds))

    hunt(scenario, seeds, source=args.scenario, processes=args.processes, heard=heard)
    failed = [verdict for verdict in verdicts if verdict.problem]
    totals = {
        "scenario": scenario.name,
        "seeds": len(verdicts),
        "failed": [verdict.seed for verdict in failed],
        "requests": sum(verdict.requests for verdict in verdicts),
        "failovers": sum(verdict.failovers for verdict in verdicts),
        "tokens": sum(verdict.tokens for verdict in verdicts),
        "checks": sum(verdict.checks for verdict in verdicts),
        "real_s": round(time.monotonic() - begin, 1),
    }
    show(json.dumps(totals) if args.json else "  ".join(f"{name}={value}" for name, value in totals.items()))
    if failed:
        raise ViolationError(f"seed {failed[0].seed}: {failed[0].problem}", hint=failed[0].replay)


class Tenths:
    """Says how far a long run is, each tenth of the way."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = 0
        self._begin = time.monotonic()

    def __call__(self, share: float) -> None:
        tenth = int(10 * share)
        if tenth > self._said and time.monotonic() - self._begin > QUIET_S:
            self._said = tenth
            say(f"  {self._what}: {10 * tenth} %")


THOROUGH_PEERS = 100
"""Up to so many peers the whole account of a peer is checked at each pass; beyond, once a second."""


def build_parser() -> ArgumentParser:
    """All commands and their options."""
    top = parser("python -m sim", "Swarms to try things on.", EXAMPLE)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = subcommand(commands, "local", "Real processes on this machine, and a text through them.", EXAMPLE)
    command.add_argument("--peers", type=whole(1), default=3, help="how many share the blocks (default: %(default)s)")
    command.add_argument("--model", default="smollm2", help="(default: %(default)s)")
    command.add_argument("--prompt", default="The world is", help="(default: %(default)r)")
    command.add_argument("--max-new-tokens", type=whole(1), default=48, help="(default: %(default)s)")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, sent in turn")
    command.add_argument("--requests", type=whole(1), metavar="N", help="in all (default: one a client or prompt)")
    command.add_argument("--clients", type=whole(1), default=1, help="how many ask at once (default: %(default)s)")
    command.add_argument("--spans", type=_spans, metavar="A:B,…", help="what each peer serves, instead of even parts")
    command.add_argument("--replicas", type=whole(1), default=1, help="peers for each span (default: %(default)s)")
    for kind, what in (("kill", "SIGKILL"), ("stop", "stop in good order"), ("restart", "stop if need be, and start")):
        text = f"{what}: peer2@5s is the second peer after five seconds; repeatable"
        command.add_argument(f"--{kind}", action="append", default=[], metavar="PEER@TIME", help=text)
    command.add_argument("--speedup", action="store_true", help="run the same work on one peer too, and print T1/Tn")
    command.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")
    command = subcommand(commands, "calibrate", "Measure the cost model of this machine.", CALIBRATE_EXAMPLE)
    command.add_argument("--model", default="smollm2", help="(default: %(default)s)")
    command.add_argument("--blocks", default="0:6", help="the blocks to time (default: %(default)s)")
    command = subcommand(commands, "list", "The scenarios that there are.", "  python -m sim list")
    command = subcommand(commands, "run", "A scenario in virtual time: the shipped code, one seed.", RUN_EXAMPLE)
    _add_scenario(command)
    command.add_argument("--json", action="store_true", help="the whole report as one JSON object on stdout")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the timeline: FILE.png or FILE.svg")
    command = subcommand(commands, "compare", "A scenario under each policy of choosing routes.", COMPARE_EXAMPLE)
    _add_scenario(command)
    command.add_argument("--processes", type=whole(1), help="at once (default: one a core)")
    command.add_argument("--json", action="store_true", help="all reports as one JSON array on stdout")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw bars: FILE.png or FILE.svg")
    command = subcommand(commands, "hunt", "Many seeds in parallel, until one fails.", HUNT_EXAMPLE)
    command.add_argument("--scenario", default="storm", help="a name or a .toml file (default: %(default)s)")
    _add_size(command)
    command.add_argument("--seeds", type=whole(1), default=100, help="how many (default: %(default)s)")
    command.add_argument("--first", type=whole(0), default=0, help="the first of them (default: %(default)s)")
    command.add_argument("--processes", type=whole(1), help="at once (default: one a core)")
    command.add_argument("--json", action="store_true", help="the totals as one JSON object on stdout")
    return top


def _add_scenario(command: ArgumentParser) -> None:
    command.add_argument("scenario", metavar="SCENARIO", help="a name from `python -m sim list`, or a .toml file")
    _add_size(command)
    command.add_argument("--seed", type=whole(0), default=0, help="all chance comes from it (default: %(default)s)")


def _add_size(command: ArgumentParser) -> None:
    command.add_argument("--peers", type=whole(1), help="how many peers (default: as the scenario says)")
    command.add_argument("--clients", type=whole(0), help="how many clients (default: as the scenario says)")
    command.add_argument("--duration", type=float, metavar="S", help="virtual seconds (default: as the scenario says)")


def main() -> None:
    """The command line."""
    args = build_parser().parse_args()
    set_up_logging(debug=args.debug)
    commands = {
        "local": local,
        "calibrate": measure_runner,
        "list": list_scenarios,
        "run": run_scenario,
        "compare": compare_policies,
        "hunt": hunt_seeds,
    }
    run(commands[args.command], args)


if __name__ == "__main__":
    main()
