"""Real processes on this machine under a workload, with faults on a schedule, and what came of it.

The swarm itself is `llmasos.local`, as `llmasos up` starts it; the demo, the tests and the benchmarks stand on it too.
"""

import asyncio
import itertools
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.console import say
from llmasos.errors import LLMasOSError, UsageError
from llmasos.local import LocalProcess, LocalSwarm, split_evenly
from llmasos.span import Span
from sim.report import Latency, seconds

__all__ = ["LocalFault", "LocalProcess", "LocalReport", "LocalSwarm", "LocalWork", "run_work", "split_evenly"]

_FAULT = re.compile(r"(?P<peer>[^@\s]+)@(?P<at>\d+(\.\d+)?)s?")


@dataclass(frozen=True, slots=True)
class LocalFault:
    """Something that is done to one process, so many seconds after the workload has begun."""

    kind: Literal["kill", "stop", "restart"]
    peer: str
    at_s: float

    @classmethod
    def parse(cls, kind: Literal["kill", "stop", "restart"], text: str) -> "LocalFault":
        """`peer2@5s`. Raises UsageError."""
        match = _FAULT.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} does not say which peer and when", hint=f"write --{kind} peer2@5s")
        return cls(kind, match["peer"], float(match["at"]))


@dataclass(frozen=True, slots=True)
class LocalWork:
    """`clients` at once send `requests` in all: the prompts in turn, each for `max_new_tokens` tokens."""

    prompts: tuple[str, ...]
    clients: int = 1
    requests: int = 1
    max_new_tokens: int = 48
    faults: tuple[LocalFault, ...] = ()


@dataclass(slots=True)
class LocalReport:
    """What came of it, as measured by the clients and by the kernel."""

    peers: int
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    failovers: int = 0
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    first_token: Latency = field(default_factory=Latency)
    piece: Latency = field(default_factory=Latency)
    utilisation: dict[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """For people."""
        table = Table(show_header=False, box=None)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, text in (
            ("requests", f"{self.requests - self.failed} of {self.requests} answered, {self.failovers} failovers"),
            ("tokens", f"{self.tokens} in {self.seconds:.1f} s: {self.tokens_per_s:.1f} tokens/s"),
            *((name, _text(latency)) for name, latency in (("first text", self.first_token), ("next", self.piece))),
            ("busy", ", ".join(f"{name} {share:.0%}" for name, share in self.utilisation.items())),
        ):
            table.add_row(name, text)
        return table


def _text(latency: Latency) -> str:
    return f"p50 {seconds(latency.p50_s)}, p95 {seconds(latency.p95_s)}, p99 {seconds(latency.p99_s)}"


async def run_work(swarm: LocalSwarm, spans: Sequence[Span], work: LocalWork, *, each: Any = None) -> LocalReport:
    """Run a workload on a swarm that is up. The peers of `spans` are called peer1, peer2, … in that order.

    `each` is called with every finished Generation. A request that fails is counted, with its error.
    """
    names = {f"peer{number}": span for number, span in enumerate(spans, start=1)}
    for fault in work.faults:
        if fault.peer not in names:
            raise UsageError(f"there is no {fault.peer} to {fault.kind}", hint=f"there are {', '.join(names)}")
    report = LocalReport(peers=len(spans))
    used = _CpuTimes(swarm)
    first_s: list[float] = []
    next_s: list[float] = []
    numbers = itertools.count()
    begin = time.monotonic()

    async def one(client: AsyncLLMasOS) -> None:
        while (number := next(numbers)) < work.requests:
            report.requests += 1
            asked = last = time.monotonic()
            prompt = work.prompts[number % len(work.prompts)]
            options = {"max_new_tokens": work.max_new_tokens}
            try:
                async for piece in client.stream(prompt, swarm.model, **options):  # type: ignore[arg-type]
                    now = time.monotonic()
                    if not isinstance(piece, str):
                        report.tokens += piece.completion_tokens
                        report.failovers += piece.failovers
                        report.texts.append(piece.text)
                        if each is not None:
                            each(piece)
                        continue
                    (first_s if last == asked else next_s).append(now - last)
                    last = now
            except LLMasOSError as error:
                report.failed += 1
                report.errors.append(error.message)
                say(f"  request {number + 1} failed: {error.message}")

    async with AsyncLLMasOS(swarm.address) as client, asyncio.TaskGroup() as group:
        faults = group.create_task(_inflict(swarm, names, work.faults, begin), name="faults")
        clients = [group.create_task(one(client), name=f"client {index}") for index in range(work.clients)]
        await asyncio.wait(clients)
        faults.cancel()
    report.seconds = time.monotonic() - begin
    report.tokens_per_s = report.tokens / report.seconds
    report.first_token, report.piece = Latency.of(first_s), Latency.of(next_s)
    report.utilisation = used.shares(report.seconds)
    return report


async def _inflict(swarm: LocalSwarm, names: dict[str, Span], faults: Sequence[LocalFault], begin: float) -> None:
    for fault in sorted(faults, key=lambda fault: fault.at_s):
        await asyncio.sleep(max(0.0, begin + fault.at_s - time.monotonic()))
        say(f"  {fault.at_s:g} s: {fault.kind} {fault.peer}")
        if fault.kind == "kill":
            await swarm.kill(fault.peer)
        elif fault.kind == "stop":
            await swarm.stop(fault.peer)
        else:
            if fault.peer in swarm.peers:
                await swarm.stop(fault.peer)
            await swarm.start_peer(fault.peer, str(names[fault.peer]))
            say(f"  {fault.peer} is back")


class _CpuTimes:
    """The processor time of every peer from now on, as a share of one core; only where there is a /proc."""

    def __init__(self, swarm: LocalSwarm) -> None:
        self._swarm = swarm
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        return {name: _cpu_s(peer.process.pid) for name, peer in self._swarm.peers.items()}

    def shares(self, lasted_s: float) -> dict[str, float]:
        """Of the peers that are still there."""
        return {
            name: (used - self._before.get(name, 0.0)) / lasted_s
            for name, used in self._now().items()
            if used >= self._before.get(name, 0.0)
        }


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far, in seconds; 0 when nobody tells."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:  # noqa: PTH123
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
