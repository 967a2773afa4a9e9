"""What a scenario says: a short TOML file becomes a frozen `Scenario`, or a `ScenarioError` that names the key.

The files in `sim/scenarios` are meant to be copied and changed. Every key has a default and a unit; a key that is not
known is refused, since it would otherwise be a silent mistake.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from llmasos.errors import UsageError
from sim.regions import REGIONS

HERE = Path(__file__).parent / "scenarios"

Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Some = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e7)]
Positive = Annotated[float, msgspec.Meta(gt=0.0, le=1e12)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Range = tuple[Some, Some]


class ScenarioError(UsageError):
    """A scenario that cannot be: unknown, unreadable, or with a key that makes no sense."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file. Immutable; an unknown key is an error."""


class ModelSection(Section, frozen=True):
    """The model exists only as a number of blocks."""

    blocks: Annotated[int, msgspec.Meta(ge=1, le=1_024)] = 24
    context_tokens: Some = 4_096
    row_bytes: Some = 4_096
    """Activation of one token: hidden 2,048 in bfloat16, or 1,024 in float32."""


class PeersSection(Section, frozen=True):
    """Who serves. `blocks` is what one peer can hold; `placement` says how it comes by its span."""

    count: Some = 24
    blocks: Some = 8
    placement: Literal["even", "random", "auto"] = "even"
    """even: one after the other along the model; random: anywhere; auto: as `--blocks auto` chooses."""
    regions: tuple[str, ...] = ()
    """Peers are dealt to them in turn; none means one local network."""
    block_ms: Positive = 1.5
    """A block for one row, median machine (`python -m sim calibrate` measures this machine)."""
    row_ms: Positive = 0.1
    """Each further row of a pass."""
    spread: Annotated[float, msgspec.Meta(ge=0.0, le=3.0)] = 0.0
    """Sigma of the logarithm of machines' speeds; 0.5 makes one in twenty 2.3 times slower than the median."""
    kv_tokens: Some = 65_536
    at_start: Count | None = None
    """How many are there when the clock starts; the others arrive over `arrive_over_s`."""
    arrive_over_s: Seconds = 0.0
    load_s: Seconds = 2.0
    """From the choice of a span to serving it."""
    drain_timeout_s: Seconds = 30.0


class ClientsSection(Section, frozen=True):
    """Who asks: each sends one request after the other, with pauses that are exponential around `pause_s`."""

    count: Count = 8
    per_gateway: Some = 8
    """Clients that share one process, and so one view of the swarm and one memory of what peers did."""
    prompt_tokens: Range = (16, 128)
    new_tokens: Range = (16, 64)
    pause_s: Seconds = 1.0
    patience_s: Seconds = 60.0
    """How long a client repeats a request that the swarm refused for the time being."""
    regions: tuple[str, ...] = ()


class NetworkSection(Section, frozen=True):
    """Links and registry."""

    bytes_per_s: Positive = 12.5e6
    jitter: Share = 0.1
    loss: Share = 0.0
    lookup_ms: Positive = 20.0
    """What a look-up or a store takes: measured 18 to 44 ms in a hash table of 10 to 50 nodes."""
    stale_s: Seconds = 0.0
    """A reader may see the registry as it was up to so long ago."""
    relayed: Share = 0.0
    """Share of the peers behind NAT: whatever goes to or from them takes a detour through a relay."""


class Crowd(Section, frozen=True):
    """More clients for a while."""

    at_s: Seconds
    for_s: Seconds
    clients: Some


class Fault(Section, frozen=True):
    """Something that is done to peers: to a `share` of them, drawn at random, or to all of one `region`."""

    at_s: Seconds
    kind: Literal["kill", "hang", "stop", "slow", "partition", "skew"]
    """kill and stop end the process (stop drains first); hang is silence; partition cuts a group off from the rest."""
    share: Share = 1.0
    region: str = ""
    for_s: Seconds = 0.0
    """After this long it is over: who was ended starts again. 0: never."""
    every_s: Seconds = 0.0
    """One victim each so often; 0: all at once."""
    factor: Positive = 10.0
    """slow: passes take this many times as long."""
    skew_s: Annotated[float, msgspec.Meta(ge=-86_400.0, le=86_400.0)] = 0.0
    """skew: the clock is wrong by this much."""


class Churn(Section, frozen=True):
    """Peers come and go all the time; how long they stay follows a Weibull law with a heavy tail."""

    session_s: Positive
    """Median time that a peer stays."""
    shape: Annotated[float, msgspec.Meta(gt=0.1, le=5.0)] = 0.5
    """Below 1 most leave soon and a few stay for very long; measurements of file-sharing swarms find 0.4 to 0.6."""
    away_s: Positive = 20.0
    """Median time until it is back."""
    kinds: tuple[Literal["kill", "hang", "stop"], ...] = ("kill", "stop")
    steady: Share = 0.0
    """Share of the peers that never leave."""


class Liars(Section, frozen=True):
    """A share of the peers publishes what is not so."""

    share: Share
    claim: Literal["fast", "slow", "zero", "infinite", "span", "idle"]
    """fast, slow: `factor` times its speed; span: all blocks; idle: never any load."""
    factor: Positive = 100.0


class Promises(Section, frozen=True):
    """What has to hold in this scenario beyond what holds in all (see `sim.invariants`)."""

    coverage_s: Seconds | None = None
    """Blocks without a peer are served again after at most this long."""
    failed_share: Share = 0.0
    """Requests that may fail, with a typed error, after all patience, although every block had a peer."""
    stall_s: Seconds = 120.0
    """The longest that a single token may take."""


class Scenario(Section, frozen=True):
    """A whole file."""

    title: str
    name: str = ""
    duration_s: Positive = 120.0
    settle_s: Seconds = 120.0
    """How long running requests may take to end when the time is over."""
    model: ModelSection = ModelSection()
    peers: PeersSection = PeersSection()
    clients: ClientsSection = ClientsSection()
    network: NetworkSection = NetworkSection()
    promises: Promises = Promises()
    crowds: tuple[Crowd, ...] = ()
    faults: tuple[Fault, ...] = ()
    churn: Churn | None = None
    liars: tuple[Liars, ...] = ()


def scenarios() -> list[Scenario]:
    """Those that come with the simulator, by name."""
    return [load(path.stem) for path in sorted(HERE.glob("*.toml"))]


def load(name: str) -> Scenario:
    """The scenario of that name, or the one in that file. Raises ScenarioError."""
    path = Path(name) if name.endswith(".toml") or "/" in name else HERE / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ScenarioError(f"there is no scenario {name!r}", hint=_known()) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ScenarioError(f"the scenario {name!r} cannot be read: {why}", hint=_known()) from None
    return parse(text, path.stem, str(path))


def _known() -> str:
    return f"take one of {', '.join(found.stem for found in sorted(HERE.glob('*.toml')))}, or a .toml file"


def parse(text: str, name: str, source: str) -> Scenario:
    """The scenario in the text of a file. Raises ScenarioError, which names `source` and the key."""
    try:
        scenario = msgspec.toml.decode(text, type=Scenario)
    except msgspec.DecodeError as error:
        raise ScenarioError(f"{source}: {error}", hint="the keys and their units stand in sim/scenario.py") from None
    return check(msgspec.structs.replace(scenario, name=scenario.name or name), source)


def check(scenario: Scenario, source: str = "the scenario") -> Scenario:
    """Refuse what fits its types and still cannot be."""
    peers, clients = scenario.peers, scenario.clients
    if peers.placement == "even" and peers.count * peers.blocks < scenario.model.blocks:
        raise ScenarioError(
            f"{source}: {peers.count} peers of {peers.blocks} blocks do not cover {scenario.model.blocks} blocks",
            hint="give more peers, or more blocks a peer",
        )
    for low, high in (clients.prompt_tokens, clients.new_tokens):
        if low > high:
            raise ScenarioError(f"{source}: the range from {low} to {high} is empty")
    if clients.prompt_tokens[1] + clients.new_tokens[1] > scenario.model.context_tokens:
        raise ScenarioError(f"{source}: the longest request does not fit {scenario.model.context_tokens} tokens")
    named = [*peers.regions, *clients.regions, *(fault.region for fault in scenario.faults if fault.region)]
    for region in named:
        if region not in REGIONS:
            raise ScenarioError(f"{source}: there is no region {region!r}", hint=f"known: {', '.join(REGIONS)}")
    return scenario


def resize(
    scenario: Scenario, *, peers: int | None = None, clients: int | None = None, duration_s: float | None = None
) -> Scenario:
    """The same scenario with more or fewer of them, or longer. Raises ScenarioError when that cannot be."""
    changed = msgspec.structs.replace
    if peers is not None:
        at_start = scenario.peers.at_start
        if at_start:  # none remains none
            at_start = min(peers, max(1, round(at_start * peers / scenario.peers.count)))
        scenario = changed(scenario, peers=changed(scenario.peers, count=peers, at_start=at_start))
    if clients is not None:
        scenario = changed(scenario, clients=changed(scenario.clients, count=clients))
    if duration_s is not None:
        scenario = changed(scenario, duration_s=duration_s)
    return check(scenario)
