"""Real processes on this machine under a workload, with faults on a schedule, and what came of it.

The swarm itself is `llmasos.local`, as `llmasos up` starts it; the demo, the tests and the benchmarks stand on it too.
`LinkedSwarm` is the same with links of a latency and a bandwidth between its processes.
"""

import asyncio
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from rich.table import Table

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.generation import Generation
from llmasos.config import ClientConfig, NetworkConfig
from llmasos.console import say
from llmasos.errors import LLMasOSError, UsageError
from llmasos.identity import Identity
from llmasos.local import LocalProcess, LocalSwarm, split_evenly
from llmasos.network import Network
from llmasos.p2p import P2PNetwork
from llmasos.span import Span
from sim.links import CLIENT, LinkedNetwork, LinkPlan
from sim.report import Latency, counted, seconds

__all__ = [
    "FAULTS",
    "LinkedSwarm",
    "LocalFault",
    "LocalProcess",
    "LocalReport",
    "LocalSwarm",
    "LocalWork",
    "run_work",
    "split_evenly",
]

FaultKind = Literal["kill", "stop", "restart"]
FAULTS: tuple[FaultKind, ...] = get_args(FaultKind)
_FAULT = re.compile(r"(?P<peer>[^@\s]+)@(?P<at>\d+(\.\d+)?)s?")


@dataclass(frozen=True, slots=True)
class LocalFault:
    """Something that is done to one process, so many seconds after the workload has begun."""

    kind: FaultKind
    peer: str
    at_s: float

    @classmethod
    def parse(cls, kind: FaultKind, text: str) -> "LocalFault":
        """`peer2@5s`. Raises UsageError."""
        match = _FAULT.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} does not say which peer and when", hint=f"write --{kind} peer2@5s")
        return cls(kind, match["peer"], float(match["at"]))

    def __str__(self) -> str:
        return f"{self.kind} {self.peer}"


@dataclass(frozen=True, slots=True)
class LocalWork:
    """`clients` at once send `requests` in all: the prompts in turn, each for `max_new_tokens` tokens.

    With a `rate_per_s`, requests fall due one after the other at that rate, and are begun when a client is free.
    """

    prompts: tuple[str, ...]
    clients: int = 1
    requests: int = 1
    max_new_tokens: int = 48
    rate_per_s: float | None = None
    faults: tuple[LocalFault, ...] = ()

    def check(self, names: Iterable[str]) -> None:
        """Raise UsageError when there is a fault for nobody."""
        known = list(names)
        for fault in self.faults:
            if fault.peer not in known:
                raise UsageError(f"there is no {fault.peer} to {fault.kind}", hint=f"there are {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Speedup:
    """How much more the swarm did in a second than `peers` peers with the same work, undisturbed: T1/Tn for one."""

    peers: int
    tokens_per_s: float
    ratio: float


@dataclass(slots=True)
class LocalReport:
    """What came of it, as measured by the clients and by the kernel.

    `first_token` counts from when a request fell due; `token` is the time between pieces of text, mostly a token each.
    """

    peers: int
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    failovers: int = 0
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    first_token: Latency = field(default_factory=Latency)
    token: Latency = field(default_factory=Latency)
    utilisation: dict[str, float] = field(default_factory=dict)
    """The processor time of each peer, as a share of one core."""
    speedups: list[Speedup] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One line of data, for scripts that want no JSON."""
        speedups = "".join(f" speedup_{speedup.peers}={speedup.ratio:.3f}" for speedup in self.speedups)
        return (
            f"requests={self.requests} failed={self.failed} tokens_per_s={self.tokens_per_s:.2f} "
            f"first_token_p95_s={self.first_token.p95_s:.4f} token_p95_s={self.token.p95_s:.4f} "
            f"failovers={self.failovers}{speedups}"
        )

    def table(self) -> Table:
        """For people."""
        table = Table(show_header=False, box=None)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, text in (
            (
                "requests",
                f"{self.requests - self.failed} of {self.requests} answered, {counted(self.failovers, 'failover')}",
            ),
            ("tokens", f"{self.tokens:,} in {self.seconds:.1f} s: {self.tokens_per_s:.1f} tokens/s"),
            ("first token", _text(self.first_token)),
            ("next tokens", _text(self.token)),
            ("busy", ", ".join(f"{name} {share:.0%}" for name, share in self.utilisation.items()) + " of a core"),
            *(("speedup", _compared(speedup)) for speedup in self.speedups),
        ):
            table.add_row(name, text)
        return table


def _text(latency: Latency) -> str:
    if not latency.count:
        return "-"
    return f"p50 {seconds(latency.p50_s)}, p95 {seconds(latency.p95_s)}, p99 {seconds(latency.p99_s)}"


def _compared(speedup: Speedup) -> str:
    who = "one peer" if speedup.peers == 1 else f"{speedup.peers} peers"
    return f"{speedup.ratio:.2f} against {who} ({speedup.tokens_per_s:.1f} tokens/s)"


class LinkedSwarm(LocalSwarm):
    """A swarm whose processes are as far apart as a plan says. Its peers are those of `names`, and no others.

    Who is who must be known to all from the start, so each process gets an identity before it is started.
    """

    def __init__(
        self, plan: LinkPlan, names: Sequence[str], *, model: str = "smollm2", show_talk: bool = False
    ) -> None:
        super().__init__(model=model, show_talk=show_talk)
        plan.check(names)
        self._plan = plan
        self._folder = tempfile.TemporaryDirectory(prefix="llmasos-links-")
        self._ids = {}
        for name in (*names, CLIENT):
            identity = Identity.generate()
            identity.save(self._key_file(name))
            self._ids[name] = identity.peer_id

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            self._folder.cleanup()

    def peer_command(self, name: str) -> list[str]:
        """See `LocalSwarm`."""
        links = self._plan.links_of(name, self._ids)
        return ["-m", "sim.peer", links.to_json(), "--identity", str(self._key_file(name))]

    async def client_network(self) -> Network:
        """Where the clients of the swarm stand; for one client at a time, who closes it."""
        network = await P2PNetwork.create(NetworkConfig(listen=False, identity=self._key_file(CLIENT)))
        return LinkedNetwork(network, self._plan.links_of(CLIENT, self._ids))

    def _key_file(self, name: str) -> Path:
        return Path(self._folder.name) / name


async def run_work(
    swarm: LocalSwarm,
    spans: Sequence[Span],
    work: LocalWork,
    *,
    config: ClientConfig | None = None,
    each: Callable[[Generation], None] | None = None,
    done: Callable[[float], None] | None = None,
) -> LocalReport:
    """Run a workload on a swarm that is up. The peers of `spans` are called peer1, peer2, … in that order.

    `each` is called with every finished Generation, `done` with the share of the requests that have ended. A request
    that fails is counted, with its error.
    """
    names = {f"peer{number}": span for number, span in enumerate(spans, start=1)}
    work.check(names)
    network = await swarm.client_network() if isinstance(swarm, LinkedSwarm) else None
    async with AsyncLLMasOS(swarm.address, config=config, network=network) as client:
        await client.generator(swarm.model)  # the model's ends are loaded before the clock starts
        run = _Run(swarm, names, work, each, done)
        return await run.play(client)


class _Run:
    """One workload on its way."""

    def __init__(
        self,
        swarm: LocalSwarm,
        names: dict[str, Span],
        work: LocalWork,
        each: Callable[[Generation], None] | None,
        done: Callable[[float], None] | None,
    ) -> None:
        self._swarm = swarm
        self._names = names
        self._work = work
        self._each = each
        self._done = done
        self._report = LocalReport(peers=len(names))
        self._first_s: list[float] = []
        self._next_s: list[float] = []
        self._numbers = iter(range(work.requests))
        self._ended = 0
        self._busy = _CpuTimes()
        self._begin = 0.0

    async def play(self, client: AsyncLLMasOS) -> LocalReport:
        report = self._report
        for peer in self._swarm.peers.values():
            self._busy.begin(peer)
        self._begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            faults = {group.create_task(self._inflict(fault)): fault for fault in self._work.faults}
            clients = [group.create_task(self._ask(client)) for _ in range(self._work.clients)]
            await asyncio.wait(clients)
            for task, fault in faults.items():
                if task.cancel():
                    say(f"  the work was done before {fault} at {fault.at_s:g} s had come to its end")
        report.seconds = time.monotonic() - self._begin
        report.tokens_per_s = report.tokens / report.seconds
        report.first_token, report.token = Latency.of(self._first_s), Latency.of(self._next_s)
        for peer in self._swarm.peers.values():
            self._busy.end(peer)
        report.utilisation = {name: self._busy.spent_s.get(name, 0.0) / report.seconds for name in self._names}
        return report

    async def _ask(self, client: AsyncLLMasOS) -> None:
        """One client: request after request, until none is left."""
        report, work = self._report, self._work
        for number in self._numbers:
            due = time.monotonic()
            if work.rate_per_s is not None:
                due = self._begin + number / work.rate_per_s
                await asyncio.sleep(due - time.monotonic())
            report.requests += 1
            try:
                await self._generate(client, work.prompts[number % len(work.prompts)], due)
            except LLMasOSError as error:
                report.failed += 1
                report.errors.append(error.message)
                say(f"  request {number + 1} failed: {error.message}")
            self._ended += 1
            if self._done is not None:
                self._done(self._ended / work.requests)

    async def _generate(self, client: AsyncLLMasOS, prompt: str, due: float) -> None:
        report, last = self._report, due
        async for piece in client.stream(prompt, self._swarm.model, max_new_tokens=self._work.max_new_tokens):
            now = time.monotonic()
            if isinstance(piece, str):
                (self._first_s if last == due else self._next_s).append(now - last)
                last = now
                continue
            report.tokens += piece.completion_tokens
            report.failovers += piece.failovers
            report.texts.append(piece.text)
            if self._each is not None:
                self._each(piece)

    async def _inflict(self, fault: LocalFault) -> None:
        """Do it when it is due. What cannot be done is told, and costs nobody else anything."""
        await asyncio.sleep(self._begin + fault.at_s - time.monotonic())
        peer = self._swarm.peers.get(fault.peer)
        if peer is None and fault.kind != "restart":
            say(f"  {fault.at_s:g} s: there is no {fault.peer} any more to {fault.kind}")
            return
        say(f"  {fault.at_s:g} s: {fault}")
        if peer is not None:
            self._busy.end(peer)
            await (self._swarm.kill if fault.kind == "kill" else self._swarm.stop)(fault.peer)
        if fault.kind == "restart":
            try:
                self._busy.begin(await self._swarm.start_peer(fault.peer, str(self._names[fault.peer])))
            except LLMasOSError as error:
                self._report.errors.append(error.message)
                say(f"  {fault.peer} did not come back: {error.message}")
            else:
                say(f"  {fault.peer} is back after {time.monotonic() - self._begin - fault.at_s:.1f} s")


class _CpuTimes:
    """The processor time that peers spend, by name; only where there is a /proc."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self._begun_s: dict[int, float] = {}

    def begin(self, peer: LocalProcess) -> None:
        """Count from now on."""
        self._begun_s[peer.process.pid] = cpu_s(peer.process.pid)

    def end(self, peer: LocalProcess) -> None:
        """Add what it has spent since."""
        pid = peer.process.pid
        spent_s = max(cpu_s(pid) - self._begun_s.pop(pid, 0.0), 0.0)
        self.spent_s[peer.name] = self.spent_s.get(peer.name, 0.0) + spent_s


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, in seconds; 0 when nobody tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
