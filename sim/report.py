"""What came of a run: numbers for programs, a table for people."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles in seconds; all zero when nothing was measured."""

    count: int = 0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p95_s: float = 0.0
    p99_s: float = 0.0

    @classmethod
    def of(cls, seconds: "Sequence[float] | array[float]") -> "Latency":
        """Of a list of measurements."""
        if not seconds:
            return cls()
        ranked = sorted(seconds)
        return cls(
            len(ranked),
            sum(ranked) / len(ranked),
            percentile(ranked, 0.5),
            percentile(ranked, 0.95),
            percentile(ranked, 0.99),
        )

    @classmethod
    def mean(cls, several: "Sequence[Latency]") -> "Latency":
        """Of several runs: the mean of each number, weighted by how much was measured."""
        count = sum(one.count for one in several)
        if not count:
            return cls()

        def over(number: Callable[[Latency], float]) -> float:
            return sum(one.count * number(one) for one in several) / count

        return cls(
            count,
            over(lambda one: one.mean_s),
            over(lambda one: one.p50_s),
            over(lambda one: one.p95_s),
            over(lambda one: one.p99_s),
        )


def percentile(ranked: Sequence[float], share: float) -> float:
    """Of a sorted list: the smallest value that at least `share` of them do not exceed."""
    index = max(0, -(-int(share * 1_000_000) * len(ranked) // 1_000_000) - 1)
    return ranked[min(index, len(ranked) - 1)]


@dataclass(frozen=True, slots=True)
class Sample:
    """One point of the timeline: what was so at `at_s`, and what happened since the point before."""

    at_s: float
    online: int
    hung: int
    joining: int
    leaving: int
    away: int
    weakest_block_peers: int
    missing_blocks: int
    active: int
    tokens_per_s: float
    token: Latency
    failed: int


@dataclass(frozen=True, slots=True)
class PeerUse:
    """One peer: which blocks it had last, and the share of its time that it computed."""

    name: str
    blocks: str
    utilisation: float
    relayed: bool = False


@dataclass(slots=True)
class Report:
    """A run. Everything but `real_s`, `cpu_s` and `peak_mib` is the same whenever it is run."""

    scenario: str
    title: str
    policy: str
    seed: int
    peers: int
    clients: int
    blocks: int
    duration_s: float
    requests: int = 0
    done: int = 0
    failed: int = 0
    refused: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    prompt_tokens: int = 0
    tokens_per_s: float = 0.0
    bound_tokens_per_s: float = 0.0
    """What no router could exceed: the maximum flow through the peers' blocks, were they always full."""
    first_token: Latency = Latency()
    token: Latency = Latency()
    failovers: int = 0
    replayed_tokens: int = 0
    hops: float = 0.0
    moves: int = 0
    """Times that a peer went to other blocks by itself."""
    longest_gap_s: float = 0.0
    checks: int = 0
    virtual_s: float = 0.0
    events: int = 0
    turns: int = 0
    trace: str = ""
    violations: list[str] = field(default_factory=list)
    replay: str = ""
    real_s: float = 0.0
    cpu_s: float = 0.0
    peak_mib: float = 0.0
    peers_used: list[PeerUse] = field(default_factory=list)
    timeline: list[Sample] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One line of data, for scripts that want no JSON."""
        return (
            f"{self.scenario} seed={self.seed} trace={self.trace} requests={self.requests} done={self.done} "
            f"failed={self.failed} tokens_per_s={self.tokens_per_s:.1f} first_token_p95_s={self.first_token.p95_s:.4f} "
            f"token_p95_s={self.token.p95_s:.4f} failovers={self.failovers} violations={len(self.violations)}"
        )

    def table(self) -> Table:
        """For people."""
        table = Table(title=f"{self.scenario}: {self.title}", title_justify="left", show_header=False, box=None)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        used = sorted(peer.utilisation for peer in self.peers_used)
        for name, text in (
            (
                "swarm",
                f"{counted(self.peers, 'peer')}, {counted(self.blocks, 'block')}, {counted(self.clients, 'client')}, "
                f"policy {self.policy}",
            ),
            ("requests", self._requests()),
            (
                "tokens",
                f"{self.tokens:,} generated, {self.tokens_per_s:,.1f} tokens/s (bound {self.bound_tokens_per_s:,.1f}), "
                f"{self.hops:.1f} hops a route",
            ),
            ("first token", _text(self.first_token)),
            ("next tokens", _text(self.token)),
            ("failovers", f"{self.failovers:,}; they and hand-overs replayed {counted(self.replayed_tokens, 'token')}"),
            ("coverage", self._coverage()),
            ("utilisation", _spread(used)),
            *self._behind_relays(),
            ("checks", f"{self.checks:,} invariants held" if not self.violations else "VIOLATED"),
            ("time", f"{self.virtual_s:,.0f} s virtual in {self.real_s:.1f} s real, {self.peak_mib:,.0f} MiB"),
            ("trace", f"{self.trace}  ({self.events:,} events, seed {self.seed})"),
        ):
            table.add_row(name, text)
        return table

    def _coverage(self) -> str:
        moved = f"; peers moved {counted(self.moves, 'time')}" if self.moves else ""
        return f"longest time without a peer for some block: {self.longest_gap_s:.0f} s{moved}"

    def _behind_relays(self) -> list[tuple[str, str]]:
        """How much those behind a relay are used, and those who are not; nothing when nobody is."""
        used = {
            relayed: [peer.utilisation for peer in self.peers_used if peer.relayed is relayed]
            for relayed in (True, False)
        }
        if not used[True]:
            return []
        direct = f", the others {sum(used[False]) / len(used[False]):.0%}" if used[False] else ""
        mean = sum(used[True]) / len(used[True])
        relayed = counted(len(used[True]), "peer")
        return [("relays", f"{relayed} behind a relay, busy {mean:.0%} of the time{direct}")]

    def _requests(self) -> str:
        errors = ", ".join(f"{count:,} {name}" for name, count in self.errors.items())
        return f"{self.done:,} of {self.requests:,} answered, {self.failed} failed, {self.refused} tried again" + (
            f" ({errors})" if errors else ""
        )


def _text(latency: Latency) -> str:
    return f"p50 {seconds(latency.p50_s)}, p95 {seconds(latency.p95_s)}, p99 {seconds(latency.p99_s)}"


def _spread(used: list[float]) -> str:
    if not used:
        return "-"
    return (
        f"mean {sum(used) / len(used):.0%}, half of the peers below {used[len(used) // 2]:.0%}, busiest {used[-1]:.0%}"
    )


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 peer, 2 peers."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def seconds(value: float) -> str:
    """Three digits, with the unit that fits."""
    if value < 0.001:
        return f"{value * 1e6:.0f} us"
    if value < 1.0:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s"
