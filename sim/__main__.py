"""python -m sim: swarms to try things on."""

import json
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from llmasos.console import parser, run, say, seconds, set_up_logging, show, subcommand, talk, whole
from sim import plot
from sim.baselines import POLICIES
from sim.compare import compare, in_words
from sim.compare import draw as draw_comparison
from sim.hunt import Verdict, hunt
from sim.invariants import ViolationError
from sim.local_command import EXAMPLE as LOCAL_EXAMPLE
from sim.local_command import add_local, local
from sim.report import counted
from sim.scenario import HERE, load, resize, scenarios
from sim.simulation import simulate
from sim.tenths import Tenths

COMPARE_EXAMPLE = "  python -m sim compare stragglers --seed 7 --plot stragglers.png"
HUNT_EXAMPLE = "  python -m sim hunt churn --seeds 1000 --peers 12 --duration 60"
RUN_EXAMPLE = """  python -m sim run churn --peers 100 --seed 7
  python -m sim run sim/scenarios/liars.toml --json > report.json"""
CALIBRATE_EXAMPLE = "  python -m sim calibrate --model smollm2 --blocks 0:10"


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
        f"{scenario.name}: {counted(scenario.peers.count, 'peer')} of {counted(scenario.peers.blocks, 'block')}, "
        f"{counted(scenario.clients.count, 'client')}, {scenario.duration_s:g} s of virtual time, seed {args.seed}"
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
    seeds = range(args.seed, args.seed + args.seeds)
    policies = ", ".join(POLICIES)
    say(f"{scenario.name}, {in_words(seeds)}, under {len(POLICIES)} policies: {policies}")
    comparison = compare(
        scenario,
        seeds,
        source=args.scenario,
        processes=args.processes,
        heard=lambda report: say(f"  {report.policy}, seed {report.seed}: {report.tokens_per_s:.1f} tokens/s"),
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
        say(comparison.rule())
    if args.plot is not None:
        draw_comparison(comparison, args.plot)
        say(f"plotted to {args.plot}")
    for report in comparison.reports[:1]:
        if report.violations:
            raise ViolationError(report.violations[0], hint=report.replay)


def hunt_seeds(args: Namespace) -> None:
    """Many seeds of one scenario, in parallel; the first that fails, and how to replay it."""
    scenario = resize(load(args.scenario), peers=args.peers, clients=args.clients, duration_s=args.duration)
    seeds = range(args.seed, args.seed + args.seeds)
    say(f"hunting through {counted(len(seeds), 'seed')} of {scenario.name}, from {args.seed} on")
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


THOROUGH_PEERS = 100
"""Up to so many peers the whole account of a peer is checked at each pass; beyond, each five seconds."""


def build_parser() -> ArgumentParser:
    """All commands and their options."""
    top = parser("python -m sim", "Swarms to try things on.", LOCAL_EXAMPLE)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_local(commands)
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
    command.add_argument("--seeds", type=whole(1), default=1, help="how many, from --seed on (default: %(default)s)")
    command.add_argument("--processes", type=whole(1), help="at once (default: one a core)")
    command.add_argument("--json", action="store_true", help="a report a policy, as one JSON array on stdout")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw bars: FILE.png or FILE.svg")
    command = subcommand(commands, "hunt", "Many seeds in parallel, until one fails.", HUNT_EXAMPLE)
    command.add_argument(
        "scenario", nargs="?", default="storm", metavar="SCENARIO", help="a name or a .toml file (default: %(default)s)"
    )
    _add_size(command)
    command.add_argument("--seed", type=whole(0), default=0, help="the first of them (default: %(default)s)")
    command.add_argument("--seeds", type=whole(1), default=100, help="how many, from --seed on (default: %(default)s)")
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
    command.add_argument(
        "--duration", type=_duration, metavar="S", help="virtual seconds (default: as the scenario says)"
    )


def _duration(text: str) -> float:
    """An argparse type: virtual seconds, more than none."""
    value = seconds(text)
    if value == 0:
        raise ArgumentTypeError("a run of 0 seconds is none")
    return value


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
