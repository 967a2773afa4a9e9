"""llmasos: the command line for those who use a swarm."""

import asyncio
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmasos import __version__
from llmasos.cli_route import add_route, route
from llmasos.cli_serve import add_gateway, add_key, add_up, gateway, key, up
from llmasos.client.chat import add_chat, chat, tell_event
from llmasos.client.options import FLAGS, add_codec, add_draft, add_numbers, client_config, is_gateway, with_address
from llmasos.config import NetworkConfig
from llmasos.console import parser, progress, run, say, set_up_logging, show, subcommand, tell, whole
from llmasos.doctor import add_doctor, doctor
from llmasos.errors import LLMasOSError, UsageError, serve_command
from llmasos.multiaddr import parse_multiaddr

if TYPE_CHECKING:
    from llmasos.client.trace import Trace

API_KEY = "LLMASOS_API_KEY"


async def generate(args: Namespace) -> None:
    """Write a completion to stdout: piece by piece, or as one JSON object."""
    prompt = _prompt(args.prompt)
    if args.trace is not None:
        with _writing(args.trace):  # else a whole text is written first
            args.trace.open("a").close()
    if is_gateway(args.join):
        say(f"asking the gateway {args.join[0]}")
    else:
        say(f"joining the swarm, loading the ends of {args.model}")
    from llmasos.blocks.lean import import_lean

    import_lean()
    from llmasos.client.async_client import AsyncLLMasOS
    from llmasos.client.generation import Generation

    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "seed": args.seed,
        "stop": args.stop,
        "trace": args.trace is not None,
    }
    config = client_config(args)
    async with AsyncLLMasOS(args.join, config=config, api_key=_api_key(args), on_event=tell_event) as client:
        result: Generation | None = None
        async for piece in client.stream(prompt, args.model, **options):
            if isinstance(piece, Generation):
                result = piece
            elif not args.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    assert result is not None, "a stream that did not raise ends with its Generation"
    if args.json:
        show(json.dumps(result.as_json(), ensure_ascii=False))
    else:
        show("")
    if result.trace is not None:
        await asyncio.to_thread(_save_trace, result.trace, args.trace)
    if args.json:
        return
    hops = " → ".join(f"{hop.blocks} on {hop.peer[-8:]}" for hop in result.route)
    say(f"{result.completion_tokens} tokens, {result.tokens_per_s:.1f} tokens/s, route {hops}", style="dim")


def _save_trace(trace: "Trace", path: Path) -> None:
    from llmasos.client.trace import chrome_trace

    with _writing(path):
        path.write_text(json.dumps(chrome_trace(trace)), encoding="utf-8")
    head = ("blocks", "peer", "queue", "compute", "network")
    hops = ((hop, (hop.queue_ms, hop.compute_ms, hop.network_ms)) for hop in trace.hops)
    tell(
        head,
        ([hop.blocks, hop.peer[-8:], *(f"{part:,.1f} ms" for part in parts)] for hop, parts in hops),
        left=head[:2],
    )
    say(f"{len(trace.steps)} steps are in {path}: open it at https://ui.perfetto.dev", style="dim")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


async def status(args: Namespace) -> None:
    """What the swarm serves: a table, or one JSON object."""
    found = await _look(args)
    if args.json:
        show(json.dumps(found, ensure_ascii=False))
        return
    if not found["models"]:
        join = "MULTIADDR" if is_gateway(args.join) else args.join[0]
        say(f"no peer serves blocks here; start one: {serve_command('auto', 'smollm2', join)}")
    for model in found["models"]:
        _show_model(model, "MULTIADDR" if is_gateway(args.join) else args.join[0])


async def models(args: Namespace) -> None:
    """What can be named as a model here: aliases, and what a swarm serves. Or fetch one."""
    if args.pull is not None:
        await _pull(args)
        return
    from llmasos.blocks.lean import import_lean

    import_lean()
    from llmasos.blocks.registry import ALIASES, resolve

    found: list[dict[str, Any]] = []
    for name, alias in ALIASES.items():
        spec = await asyncio.to_thread(resolve, name)
        found.append({"model": name, "alias_of": alias.repository, "blocks": spec.blocks, "digest": spec.digest})
    for served in (await _look(args))["models"] if args.join else []:
        entry = next((entry for entry in found if entry["model"] == served["model"]), None)
        if entry is None:
            found.append(entry := {"model": served["model"], "alias_of": None, "blocks": served["blocks"]})
        entry |= {"covered": served["covered"], "missing": served["missing"]}
    if args.json:
        show(json.dumps({"models": found}, ensure_ascii=False))
        return
    for entry in found:
        notes = [f"{entry['blocks']} blocks"]
        if "covered" in entry:
            notes.append("served" if entry["covered"] else f"served but for {', '.join(entry['missing'])}")
        show(entry["model"])
        say(f"  {', '.join(notes)}", style="dim")
        if entry["alias_of"]:
            say(f"  alias of {entry['alias_of']}; embedded here with its package", style="dim")
    say("besides: hub ids (organisation/name), directories of safetensors, .gguf files", style="dim")


async def _pull(args: Namespace) -> None:
    """Fetch a model; stdout: where it is."""
    say(f"looking for {args.pull}")
    from llmasos.blocks.pull import pull

    with progress(f"fetching {args.pull}") as report:
        pulled = await asyncio.to_thread(pull, args.pull, report)
    found = {"model": args.pull, "path": str(pulled.path), "files": pulled.files, "size_bytes": pulled.size_bytes}
    show(json.dumps(found, ensure_ascii=False) if args.json else found["path"])
    say(f"{pulled.files} files, {pulled.size_bytes / 1e6:,.0f} MB, checksums are right", style="dim")


async def _look(args: Namespace) -> dict[str, Any]:
    """The object of `status --json`."""
    if is_gateway(args.join):
        from llmasos.client.async_client import AsyncLLMasOS

        async with AsyncLLMasOS(args.join, api_key=_api_key(args)) as client:
            return await client.status()
    say("joining the swarm", style="dim")
    from llmasos.p2p import P2PNetwork
    from llmasos.routing.directory import Directory
    from llmasos.routing.view import status as describe

    async with await P2PNetwork.create(NetworkConfig(listen=False)) as network:
        await network.join(args.join)
        directory = Directory(network)
        await directory.refresh_all()
        return describe(directory.view, network.now())


def _show_model(model: dict[str, Any], join: str) -> None:
    if model["covered"]:
        verdict = "usable: every block has a peer"
    else:
        gaps = ", ".join(model["missing"])
        command = serve_command(model["missing"][0], model["model"], join)
        verdict = f"not usable: blocks {gaps} have no peer\n  {command}"
    say(f"{model['model']} is {verdict}", style="bold green" if model["covered"] else "bold red")
    head = ("peer", "name", "blocks", "state", "rows/s", "load", "kv free", "numbers", "version", "age")
    tell(head, map(_peer_cells, model["peers"]), left=("peer", "blocks", "state", "numbers", "version"))


def _peer_cells(peer: dict[str, Any]) -> list[str]:
    return [
        peer["peer"][-8:],
        peer["name"],
        peer["blocks"],
        peer["state"],
        f"{peer['throughput']:,.0f}",
        f"{peer['load']:.0%}",
        f"{peer['kv_free_tokens']:,}",
        peer["dtype"] if peer["quantization"] == "none" else f"{peer['dtype']}, {peer['quantization']}",
        peer["version"],
        f"{peer['age_s']:.0f} s",
    ]


def _prompt(text: str) -> str:
    """The prompt, or stdin for `-`. The shell's bytes that are not UTF-8 arrive as surrogates: refused here."""
    if text == "-":
        try:
            return sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin is not UTF-8: {error.reason} at byte {error.start}") from error
    return text


def _api_key(args: Namespace) -> str | None:
    """What opens the gateway that is asked; nothing else is shown the key in the environment."""
    return (args.api_key or os.environ.get(API_KEY)) if is_gateway(args.join) else None


def _add_join(command: ArgumentParser, *, required: bool = True) -> None:
    command.add_argument(
        "--join", action="append", required=required, metavar="MULTIADDR", help="a peer of the swarm, or http://GATEWAY"
    )
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"for a gateway that wants one (default: ${API_KEY}, which others on this machine cannot read)",
    )


def _add_json(command: ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _add_generate(command: ArgumentParser) -> None:
    command.add_argument("prompt", help="the text to go on from; - reads stdin")
    command.add_argument("--model", default="smollm2", help="alias, directory, .gguf file or hub id")
    command.add_argument("--max-new-tokens", type=whole(1), default=64, help="(default: %(default)s)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    command.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    command.add_argument("--top-k", type=whole(0), default=0, help="0 for all (default)")
    command.add_argument("--seed", type=int, help="the same seed gives the same text")
    command.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    command.add_argument(
        "--trace", type=Path, metavar="FILE", help="write where the time went, for Perfetto or chrome://tracing"
    )
    add_numbers(command)
    add_codec(command)
    add_draft(command)
    _add_join(command)
    _add_json(command)


def _add_status(command: ArgumentParser) -> None:
    _add_join(command)
    _add_json(command)


def _add_models(command: ArgumentParser) -> None:
    _add_join(command, required=False)
    command.add_argument("--pull", metavar="NAME", help="fetch this model now, and check it: an alias or a hub id")
    _add_json(command)


class Command(NamedTuple):
    """A command: what runs it, what it takes, what its help says."""

    run: Callable[[Namespace], Coroutine[Any, Any, None]]
    add: Callable[[ArgumentParser], None]
    description: str
    example: str


JOIN = "--join /ip4/127.0.0.1/tcp/31337/p2p/12D3Koo…"
COMMANDS = {
    "up": Command(up, add_up, "Start a swarm, a gateway and a web page on this machine.", "  llmasos up --peers 3"),
    "generate": Command(
        generate, _add_generate, "Generate text through a swarm.", f'  llmasos generate "The world is" {JOIN}'
    ),
    "chat": Command(chat, add_chat, "Talk with a model in the terminal.", f"  llmasos chat {JOIN}"),
    "gateway": Command(
        gateway, add_gateway, "Serve a swarm over HTTP, as OpenAI's clients speak it.", f"  llmasos gateway {JOIN}"
    ),
    "key": Command(
        key, add_key, "Make an API key for a gateway.", "  llmasos key alice --file keys.toml --requests-per-minute 60"
    ),
    "status": Command(status, _add_status, "Show the models and peers of a swarm.", f"  llmasos status {JOIN} --json"),
    "route": Command(
        route, add_route, "Show the route that a request would take, and why.", f"  llmasos route --explain {JOIN}"
    ),
    "models": Command(
        models,
        _add_models,
        "List what can be named as a model, or fetch one.",
        f"  llmasos models {JOIN}\n  llmasos models --pull smollm2",
    ),
    "doctor": Command(doctor, add_doctor, "Find out what is wrong here.", f"  llmasos doctor {JOIN}"),
}


def build_parser() -> ArgumentParser:
    """All commands and their options."""
    top = parser("llmasos", "Use a swarm of language model peers.", COMMANDS["generate"].example)
    top.add_argument("--version", action="version", version=f"llmasos {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add(subcommand(commands, name, command.description, command.example))
    return top


KEY_OPTION = f"--api-key KEY, or better {API_KEY} in the environment: whoever runs the gateway gives you one"
THROUGH_GATEWAYS = ("generate", "status", "models")
"""Commands that an http:// address will do for; the others have to be in the swarm themselves."""


def begin(args: Namespace) -> Coroutine[Any, Any, None]:
    """Run a command, once its addresses can be ones: what is mistyped is told before anything is loaded."""
    join: list[str] = getattr(args, "join", None) or []
    if not is_gateway(join):
        for address in join:
            parse_multiaddr(address)
        if getattr(args, "api_key", None) is not None:
            raise UsageError("--api-key is for gateways", hint="give the address of one: --join http://HOST:PORT")
    elif args.command not in THROUGH_GATEWAYS:
        raise UsageError(
            f"llmasos {args.command} is part of the swarm itself: it wants the address of a peer, not of a gateway",
            hint="--join MULTIADDR: llmasos gateway and llmasos up print one as they start",
        )
    elif chosen := [flag for name, flag in FLAGS.items() if getattr(args, name, None) is not None]:
        raise UsageError(
            f"{', '.join(chosen)}: that is the gateway's choice, not of those who ask it",
            hint="leave it out, or be part of the swarm yourself: --join MULTIADDR",
        )
    return _carry_out(args, join)


async def _carry_out(args: Namespace, join: list[str]) -> None:
    """Run a command. What its error says to type next is for who types commands, and for this swarm."""
    try:
        await COMMANDS[args.command].run(args)
    except LLMasOSError as error:
        from llmasos.client.http_client import KEY_HINT

        error.hint = KEY_OPTION if error.hint == KEY_HINT else with_address(error.hint, join)
        raise


def main() -> None:
    """The entry point."""
    args = build_parser().parse_args()
    set_up_logging(debug=args.debug, form=getattr(args, "log_format", "pretty"))
    run(begin, args)


if __name__ == "__main__":
    main()
