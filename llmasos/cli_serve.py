"""Commands that stay: a gateway, and a whole swarm with one."""

import asyncio
import json
import os
import re
import socket
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Coroutine
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from llmasos.client.options import add_codec, add_numbers, client_config
from llmasos.config import ClientConfig, GatewayConfig
from llmasos.console import add_log_format, cannot_listen, say, show, stop_signal, whole
from llmasos.errors import LLMasOSError, UsageError
from llmasos.local import LocalSwarm, split_evenly

if TYPE_CHECKING:
    from llmasos.client.async_client import AsyncLLMasOS
    from llmasos.routing.view import SwarmView

_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?P<port>:\d{1,5})?/?")
_USUAL_PORTS = {("http", ":80"), ("https", ":443")}
"""Browsers leave them out."""


def _add_listen(command: ArgumentParser) -> None:
    config = GatewayConfig()
    command.add_argument("--host", default=config.host, help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=_port, default=config.port, help="0 takes a free one (default: %(default)s)")
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help="let in only keys of this file: llmasos key")
    command.add_argument(
        "--cors-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin call the gateway; repeatable (default: none)",
    )
    command.add_argument(
        "--max-running", type=whole(1), default=config.max_running, help="texts at once (default: %(default)s)"
    )
    command.add_argument(
        "--max-waiting", type=whole(0), default=config.max_waiting, help="requests that may wait (default: %(default)s)"
    )
    add_log_format(command)


def add_gateway(command: ArgumentParser) -> None:
    """The options of `llmasos gateway`."""
    command.add_argument("--join", action="append", required=True, metavar="MULTIADDR", help="a peer of the swarm")
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="PATH",
        help="directory or .gguf file of a model that the swarm serves; aliases and hub ids need none",
    )
    add_numbers(command)
    add_codec(command)
    _add_listen(command)


def add_up(command: ArgumentParser) -> None:
    """The options of `llmasos up`."""
    command.add_argument("--peers", type=whole(1), default=3, help="how many share the blocks (default: %(default)s)")
    command.add_argument("--model", default="smollm2", help="(default: %(default)s)")
    _add_listen(command)


def add_key(command: ArgumentParser) -> None:
    """The options of `llmasos key`."""
    command.add_argument("name", help="whose key it is")
    command.add_argument("--file", type=Path, required=True, help="key file to add it to; made if it is not there")
    command.add_argument("--scope", action="append", metavar="SCOPE", help="generate or swarm (default: both)")
    command.add_argument("--model", action="append", metavar="MODEL", help="only this model; repeatable (default: all)")
    for limit, meaning in (
        ("requests-per-minute", "requests that may begin in a minute"),
        ("tokens-per-minute", "tokens of prompts and answers in a minute"),
        ("concurrent", "requests at once"),
    ):
        command.add_argument(f"--{limit}", type=whole(1), metavar="N", help=f"{meaning} (default: no limit)")


async def gateway(args: Namespace) -> None:
    """Join a swarm and serve it over HTTP until told to stop. stdout: the address."""
    stop = stop_signal()
    _check_port(args.host, args.port)
    await _serve(args, args.join, tuple(args.model), stop)
    say("stopped")


async def up(args: Namespace) -> None:
    """A bootstrap, peers and a gateway on this machine, until told to stop. stdout: the address of the gateway."""
    stop = stop_signal()
    _check_port(args.host, args.port)
    say(f"reading the header of {args.model}")
    from llmasos.blocks.lean import import_lean

    import_lean()
    from llmasos.blocks.registry import resolve

    spans = split_evenly((await asyncio.to_thread(resolve, args.model)).blocks, args.peers)
    peers = "a peer" if len(spans) == 1 else f"{len(spans)} peers"
    say(f"starting a bootstrap and {peers} of {args.model}: {', '.join(map(str, spans))}")
    async with LocalSwarm(model=args.model, show_talk=args.debug) as swarm:
        if await _unless_stopped(swarm.start_peers(spans), stop):
            await _serve(args, [swarm.address], (args.model,), stop)
        say("stopping every process")
    say("stopped")


def _check_port(host: str, port: int) -> None:
    """Raises UsageError for a port that is taken, before seconds are spent on a swarm for it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise cannot_listen(host, port, error) from error


async def _unless_stopped(work: Coroutine[Any, Any, Any], stop: asyncio.Event) -> bool:
    """Whether `work` came to its end before a signal did."""
    tasks = [asyncio.create_task(work), asyncio.create_task(stop.wait(), name="signal")]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finished = tasks[0].done()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if finished:
        tasks[0].result()
    return finished


async def _serve(args: Namespace, join: list[str], models: tuple[str, ...], stop: asyncio.Event) -> None:
    say("joining the swarm")
    from llmasos.blocks.lean import import_lean

    import_lean()
    from llmasos.client.async_client import AsyncLLMasOS
    from llmasos.client.gateway import serve

    config = GatewayConfig(
        host=args.host,
        port=args.port,
        models=models,
        api_key_file=args.api_key_file,
        cors_origins=tuple(args.cors_origin),
        max_running=args.max_running,
        max_waiting=args.max_waiting,
    )
    numbers = client_config(args)
    async with AsyncLLMasOS(join, config=numbers) as client:
        runner = await serve(client, config, numbers)
        try:
            host, port = runner.addresses[0][:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            show(url)
            _say_ready(url, join[0], config, await _to_try(client, config, numbers))
            if not await _unless_stopped(client.wait_failed(), stop):
                say("stopping")
            else:
                raise LLMasOSError("the p2p daemon of this gateway died", hint="start the gateway again")
        finally:
            await runner.cleanup()


async def _to_try(client: "AsyncLLMasOS", config: GatewayConfig, numbers: ClientConfig) -> str:
    """A model that the gateway can load and the swarm serves; while it serves none of them, one to be served."""
    from llmasos.blocks.hub import looks_like_hub_id
    from llmasos.blocks.registry import ALIASES, resolve

    known = [(await asyncio.to_thread(resolve, source)).name for source in config.models] + list(ALIASES)
    await client.status()
    served = [name for name in client.view.models() if _whole(client.view, name, numbers)]
    usable = [name for name in known if name in served] + list(filter(looks_like_hub_id, served))
    return (usable + known)[0]


def _whole(view: "SwarmView", model: str, numbers: ClientConfig) -> bool:
    """Whether peers with these numbers have all blocks of what most serve of a model."""
    from llmasos.routing.view import Numerics

    checkpoint = view.checkpoint(model)
    return checkpoint is not None and not view.lacking(model, checkpoint, Numerics(numbers.dtype, numbers.quantization))


def _say_ready(url: str, join: str, config: GatewayConfig, model: str) -> None:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]}, ensure_ascii=False)
    say(f"the gateway is ready at {url}", style="bold green")
    say(f"  page     {url}/")
    say(f'  openai   OpenAI(base_url="{url}/v1", api_key="{"…" if config.api_key_file else "none"}")')
    say(f"  curl     curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\")
    if config.api_key_file:
        say("             -H 'Authorization: Bearer …' \\")
    say(f"             -d {quote(body)}")
    say(f"  join     {join}")
    if config.api_key_file is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        say(f"  keys     none: whoever reaches {config.host} may use it; see llmasos key --help", style="yellow")
    say("  stop     Ctrl-C")


async def key(args: Namespace) -> None:
    """Make a key, append its hash to the file, and write the key to stdout: it is shown this once."""
    from llmasos.client.gateway_keys import check_new, load_keys, new_key

    secret, lines = new_key(args.name)
    await asyncio.to_thread(check_new, args.name, args.file)
    if args.scope:
        lines += f"scopes = {_toml(args.scope)}\n"
    if args.model:
        lines += f"models = {_toml(args.model)}\n"
    for limit in ("requests_per_minute", "tokens_per_minute", "concurrent"):
        if (value := getattr(args, limit)) is not None:
            lines += f"{limit} = {value}\n"
    await asyncio.to_thread(_append, args.file, lines)
    try:
        await asyncio.to_thread(load_keys, args.file)
    except UsageError:
        await asyncio.to_thread(_take_back, args.file, lines)
        raise
    show(secret)
    say(f"added to {args.file}, as a hash: the key is shown this once", style="dim")
    say("a gateway reads its key file when it starts: start one that runs already again", style="dim")


def _toml(values: list[str]) -> str:
    quoted = ", ".join('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values)
    return f"[{quoted}]"


def _append(path: Path, lines: str) -> None:
    """Add to a file that only its owner can read."""
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600), "r+") as file:
            file.seek(0)
            file.write(("\n" if file.read() else "") + lines)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _take_back(path: Path, lines: str) -> None:
    path.write_text(path.read_text().removesuffix(lines).rstrip("\n") + "\n")


def _origin(text: str) -> str:
    """An argparse type: an origin as browsers send it, or * for all."""
    if text == "*":
        return text
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        raise ArgumentTypeError(f"{text!r} is no origin: write it as https://example.org or http://localhost:3000")
    port = "" if (match["scheme"], match["port"]) in _USUAL_PORTS else match["port"] or ""
    return f"{match['scheme']}://{match['host']}{port}"


def _port(text: str) -> int:
    port = whole(0)(text)
    if port > 65535:
        raise ArgumentTypeError(f"there are no ports above 65535, so {port} is not one")
    return port
