"""llmasos doctor: what could keep a peer or a client from working here, each with the command that mends it."""

import asyncio
import importlib.metadata
import json
import os
import shutil
import socket
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from llmasos import __version__
from llmasos.cli_route import MAX_PINGED, round_trip_s
from llmasos.config import NetworkConfig
from llmasos.console import say, show, whole
from llmasos.errors import LLMasOSError, serve_command
from llmasos.multiaddr import parse_multiaddr
from llmasos.span import Span, gaps

if TYPE_CHECKING:
    from llmasos.network import Network
    from llmasos.routing.records import PeerRecord

Verdict = Literal["ok", "warn", "fail"]

NEEDED = ("torch", "transformers", "hivemind", "safetensors", "gguf", "aiohttp", "msgspec", "llguidance")
MIN_DISK_GB = 2.0
MIN_MEMORY_GB = 1.0
"""smollm2 takes 0.6 GB in float32 on one peer."""
MAX_SKEW_S = 5.0
"""A quarter of a lease: a clock farther off makes live peers look dead, or dead ones alive."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `fix` is what to do about it."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


def add_doctor(command: ArgumentParser) -> None:
    """The options of `llmasos doctor`."""
    command.add_argument("--join", action="append", default=[], metavar="MULTIADDR", help="a swarm to try to join")
    command.add_argument("--model", default="smollm2", help="a model whose files to look for (default: %(default)s)")
    command.add_argument(
        "--port", type=whole(1), action="append", default=[], help="a port that should be free to listen on"
    )
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")


async def doctor(args: Namespace) -> None:
    """Check everything; fails if any check does."""
    findings: list[Finding] = []

    def note(finding: Finding) -> None:
        findings.append(finding)
        if not args.json:
            mark, style = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}[
                finding.verdict
            ]
            say(f"{mark}  {finding.check}: {finding.found}", style=style)
            if finding.fix:
                say(f"        {finding.fix}")

    for check in (_versions, _memory, _disk, _daemon):
        for finding in await asyncio.to_thread(check):
            note(finding)
    for port in args.port:
        note(_port(port))
    note(await _guarded("device", _device))
    note(await _guarded("model", lambda: _model(args.model)))
    if args.join:
        for finding in await _swarm(args.join, args.model):
            note(finding)
    failed = [finding.check for finding in findings if finding.verdict == "fail"]
    if args.json:
        show(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, ensure_ascii=False))
    if failed:
        raise LLMasOSError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")
    say(_passed(findings), style="bold green")


def _passed(findings: Sequence[Finding]) -> str:
    warned = sum(finding.verdict == "warn" for finding in findings)
    if not warned:
        return f"all {len(findings)} checks passed"
    return f"{len(findings) - warned} of {len(findings)} checks passed, {warned} warning{'s' if warned > 1 else ''}"


async def _guarded(name: str, check: Callable[[], Awaitable[Finding]]) -> Finding:
    try:
        return await check()
    except LLMasOSError as error:
        return Finding(name, "fail", error.message, error.hint)


# --- this machine ---------------------------------------------------------------------------------------------------


def _versions() -> list[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    findings = [Finding("python", "ok" if good else "fail", python, "" if good else "use Python 3.11, 3.12 or 3.13")]
    missing = []
    found = []
    for name in NEEDED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        findings.append(Finding("packages", "fail", f"{', '.join(missing)} not installed", "make install"))
    else:
        findings.append(Finding("packages", "ok", f"llmasos {__version__}, {', '.join(found[:2])}"))
    return findings


def _memory() -> list[Finding]:
    from llmasos.blocks.devices import free_memory_bytes

    free_gb = free_memory_bytes("cpu") / 1e9
    if free_gb < MIN_MEMORY_GB:
        return [Finding("memory", "warn", f"{free_gb:.1f} GB free", "serve few blocks: --blocks auto takes what fits")]
    return [Finding("memory", "ok", f"{free_gb:.1f} GB free")]


def _disk() -> list[Finding]:
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    existing = next(path for path in [cache, *cache.parents] if path.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    home = Path("~").expanduser()
    shown = Path("~") / existing.relative_to(home) if existing.is_relative_to(home) else existing
    if free_gb < MIN_DISK_GB:
        fix = "models of the hub go there: set HF_HOME"
        return [Finding("disk", "warn", f"{free_gb:.1f} GB free under {shown}", fix)]
    return [Finding("disk", "ok", f"{free_gb:.0f} GB free under {shown}")]


def _daemon() -> list[Finding]:
    from llmasos.p2p_hivemind import p2pd_path

    path = Path(p2pd_path())
    if not os.access(path, os.X_OK):
        return [Finding("p2p daemon", "fail", f"{path} is not there or cannot be run", "make clean install")]
    return [Finding("p2p daemon", "ok", f"{path.name} can be run")]


async def _relay(network: "Network", records: Sequence["PeerRecord"]) -> Finding:
    """Whether everybody is reached directly: nobody relays connections, so whoever is not is of no use from here."""
    records = records[:MAX_PINGED]
    rtts_s = await asyncio.gather(*(round_trip_s(network, record) for record in records))
    silent = [record for record, rtt_s in zip(records, rtts_s, strict=True) if rtt_s is None]
    known_s = [rtt_s for rtt_s in rtts_s if rtt_s is not None]
    if not silent:
        answer = "1 peer answers" if len(records) == 1 else f"{len(records)} peers answer"
        return Finding("relay", "ok", f"none is needed: {answer} directly, in {1e3 * median(known_s):.0f} ms")
    names = ", ".join(f"{record.peer[-8:]} at {(*record.addresses, 'no address')[0]}" for record in silent[:3])
    return Finding(
        "relay",
        "warn" if known_s else "fail",
        f"{len(silent)} of {len(records)} peers cannot be reached directly, and nobody relays: {names}",
        "on their side: --host 0.0.0.0 --port N, and that port open in the firewall",
    )


def _port(port: int) -> Finding:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError as error:
            return Finding(
                f"port {port}", "fail", f"{error.strerror}", f"--port {port + 1}, or end who has it: ss -ltnp"
            )
    return Finding(f"port {port}", "ok", "free; whether a firewall lets others in is not seen from here")


async def _device() -> Finding:
    from llmasos.blocks.devices import resolve_device, resolve_dtype

    device = await asyncio.to_thread(resolve_device, "auto")
    return Finding("device", "ok", f"{device}, {resolve_dtype('auto', device)}, {os.cpu_count()} CPU cores")


async def _model(name: str) -> Finding:
    from llmasos.blocks.registry import load_tokenizer, resolve

    spec = await asyncio.to_thread(resolve, name)
    await asyncio.to_thread(load_tokenizer, spec)
    return Finding("model", "ok", f"{spec.name}: {spec.blocks} blocks, {spec.family}, digest {spec.digest[:12]}")


# --- the swarm ------------------------------------------------------------------------------------------------------


async def _swarm(join: list[str], source: str) -> list[Finding]:
    """Each address by itself, then the swarm behind them. `source` is what the model is loaded from."""
    from llmasos.p2p import P2PNetwork
    from llmasos.routing.directory import Directory
    from llmasos.routing.view import status

    model = await asyncio.to_thread(_swarm_name, source)
    findings = []
    async with await P2PNetwork.create(NetworkConfig(listen=False)) as network:
        reached = False
        for address in join:
            name = f"bootstrap {parse_multiaddr(address).peer[-8:]}"
            try:
                await network.join([address])
            except LLMasOSError as error:
                findings.append(Finding(name, "fail", error.message, error.hint))
            else:
                reached = True
                findings.append(Finding(name, "ok", "answers"))
        if not reached:
            return findings
        directory = Directory(network)
        await directory.refresh_all()
        now = network.now()
        served = status(directory.view, now)["models"]
        records = [record for record in directory.view.peers(model) if record.peer != network.peer_id]
        if records:
            findings.append(await _relay(network, records))
        ahead = max((record.announced_at - now for record in directory.view.peers(model)), default=0.0)
    entry = next((entry for entry in served if entry["model"] == model), None)
    if entry is None:
        command = serve_command("auto", source, join[0])
        findings.append(Finding("coverage", "warn", f"nobody serves {model}", command))
        return findings
    if entry["covered"]:
        findings.append(Finding("coverage", "ok", f"every block of {model} has a peer"))
    else:
        findings.append(
            Finding(
                "coverage",
                "fail",
                f"blocks {', '.join(entry['missing'])} of {model} have no peer",
                _completing(entry, source, join[0]),
            )
        )
    if ahead > MAX_SKEW_S:
        findings.append(
            Finding("clock", "fail", f"a peer's is {ahead:.0f} s ahead of ours", "timedatectl set-ntp true")
        )
    else:
        findings.append(Finding("clock", "ok", "no record comes from the future"))
    versions = {peer["version"] for peer in entry["peers"]} - {__version__}
    if versions:
        other = f"peers run {', '.join(sorted(versions))}, this is {__version__}"
        findings.append(Finding("version", "warn", other, "pip install --upgrade llmasos"))
    return findings


def _swarm_name(source: str) -> str:
    """What the swarm calls a model that may be a path here; whatever is wrong with it has a finding of its own."""
    from llmasos.blocks.registry import resolve

    try:
        return resolve(source).name
    except LLMasOSError:
        return source


def _completing(entry: dict[str, Any], source: str, join: str) -> str:
    """The command that serves what is missing, in the numbers that miss just that: others would complete nobody."""
    spans: dict[tuple[str, str], list[Span]] = {}
    for peer in entry["peers"]:
        if peer["state"] == "online":
            spans.setdefault((peer["dtype"], peer["quantization"]), []).append(Span.parse(peer["blocks"]))
    lacking = {numbers: [str(gap) for gap in gaps(spans[numbers], entry["blocks"])] for numbers in sorted(spans)}
    alike = (numbers for numbers, missing in lacking.items() if missing == entry["missing"])
    dtype, quantization = next(alike, (None, None))
    return serve_command(entry["missing"][0], source, join, dtype=dtype, quantization=quantization)
