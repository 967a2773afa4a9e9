"""The peers of a scenario: who they are, how they come and go, and what is done to them."""

import asyncio
import json
import math
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from llmasos.config import MAX_RECORD_BYTES
from llmasos.errors import LLMasOSError
from llmasos.peer.runner import Speed
from llmasos.routing.records import PeerState
from llmasos.span import Span
from llmasos.tasks import TaskSet
from sim.auto import AutoPeer
from sim.invariants import Invariants
from sim.network import SimNetwork, peer_of
from sim.regions import Place
from sim.runner import SimRunner
from sim.scenario import Fault, Liars, Scenario
from sim.swarm import SimCluster

State = Literal["away", "joining", "online", "hung", "leaving"]


@dataclass(slots=True)
class Member:
    """One peer of the scenario, through all of its lives."""

    name: str
    place: Place
    speed: Speed
    span: Span | None
    """None: chosen anew each time it joins."""
    lie: Liars | None
    steady: bool
    rng: Random
    state: State = "away"
    serves: Span | None = None
    online_since: float = 0.0
    online_s: float = 0.0
    busy_s: float = 0.0
    lives: int = 0
    moves: int = 0


class Population:
    """Brings the peers of a scenario in and acts on them. `begin` returns when those of the start are online."""

    def __init__(self, scenario: Scenario, seed: int, cluster: SimCluster, invariants: Invariants) -> None:
        self.members = _members(scenario, seed)
        self._scenario = scenario
        self._cluster = cluster
        self._world = cluster.world
        self._invariants = invariants
        self._rng = Random(f"{seed}/faults")
        self._tasks = TaskSet()
        self._loop = asyncio.get_running_loop()

    # --- the whole of it ---

    async def begin(self) -> None:
        """Peers of the start come; the others, the churn and the faults are set going."""
        peers = self._scenario.peers
        first = peers.count if peers.at_start is None else peers.at_start
        await asyncio.gather(*(self.join(member) for member in self.members[:first]))
        late = self.members[first:]
        for index, member in enumerate(late):
            self._later((index + 1) * peers.arrive_over_s / len(late), member)
        if self._scenario.churn is not None:
            for member in self.members:
                if not member.steady:
                    self._tasks.spawn(self._churn(member), f"churn of {member.name}")
        for number, fault in enumerate(self._scenario.faults):
            self._tasks.spawn(self._inflict(fault), f"fault {number}")

    async def end(self) -> None:
        """Nothing more happens to peers; those that are there stay."""
        await self._tasks.close()

    def count(self) -> dict[State, int]:
        """How many are in each state."""
        counts: dict[State, int] = {"away": 0, "joining": 0, "online": 0, "hung": 0, "leaving": 0}
        for member in self.members:
            counts[member.state] += 1
        return counts

    def coverage(self) -> list[int]:
        """How many peers really serve each block now, and can be found."""
        steps = [0] * (self._scenario.model.blocks + 1)
        for member in self.members:
            refused = member.lie is not None and member.lie.claim in ("zero", "infinite")
            if member.state == "online" and member.serves is not None and not refused:
                steps[member.serves.start] += 1
                steps[member.serves.end] -= 1
        counts, running = [], 0
        for step in steps[:-1]:
            running += step
            counts.append(running)
        return counts

    def utilisation(self, member: Member) -> float:
        """The share of its time online that a peer has computed."""
        online_s, busy_s = member.online_s, member.busy_s
        peer = self._cluster.peers.get(member.name)
        if peer is not None and member.state in ("online", "hung"):
            online_s += self._loop.time() - member.online_since
            busy_s += _runner(self._cluster, member).busy_s
        return busy_s / online_s if online_s > 0 else 0.0

    # --- coming and going ---

    async def join(self, member: Member) -> None:
        """Choose a span, load it, serve it."""
        if member.state != "away":
            return
        member.state = "joining"
        place = self._world.network(member.name)
        place.tongue = None if member.lie is None else Tongue(member.lie, self._scenario.model.blocks)
        load_s = self._scenario.peers.load_s
        await asyncio.sleep(load_s * member.rng.random())
        member.lives += 1
        if member.span is None:
            await self._live_by_itself(member, place)
            return
        await asyncio.sleep(load_s)
        try:
            await self._cluster.start(
                member.name,
                str(member.span),
                speed=member.speed,
                kv_tokens=self._scenario.peers.kv_tokens,
                network=place,
                after_pass=partial(self._after_pass, member),
            )
        except LLMasOSError as error:
            self._invariants.violate(f"{member.name} could not join: {error.message}")
            return
        self._came(member, member.span)

    async def leave(self, member: Member, kind: str, away_s: float) -> None:
        """Kill, hang or stop a peer that is online, and bring it back after `away_s` (0: never)."""
        if member.state != "online":
            return
        if kind == "hang":
            member.state = "hung"
            peer = peer_of(member.name)
            self._world.hang(peer)
            if away_s:
                await asyncio.sleep(away_s)
                self._world.heal(peer)
                member.state = "online"
            return
        member.state = "leaving"
        self._note_work(member)
        if kind == "kill":
            self._cluster.kill(member.name)
        else:
            await self._cluster.stop(member.name)
        member.state, member.serves = "away", None
        if away_s:
            await asyncio.sleep(away_s)
            await self.join(member)

    async def _live_by_itself(self, member: Member, place: SimNetwork) -> None:
        """As a peer with `--blocks auto` lives: it chooses its blocks, and moves when others are needed more.

        Returns when it is online for the first time.
        """
        online = asyncio.Event()

        def came(span: Span) -> None:
            self._came(member, span)
            online.set()

        def went(going_to: Span | None) -> None:
            if going_to is not None:  # else it was told to go, by whoever keeps the books
                self._note_work(member)
                member.state, member.serves = "joining", None
                member.moves += 1

        def broke(error: BaseException) -> None:
            if member.state not in ("leaving", "away"):
                self._invariants.violate(f"{member.name} ended by itself: {error}")
            online.set()

        life = AutoPeer(
            self._cluster,
            member.name,
            self._scenario.peers.blocks,
            member.rng.getrandbits(32),
            speed=member.speed,
            kv_tokens=self._scenario.peers.kv_tokens,
            load_s=self._scenario.peers.load_s,
            after_pass=partial(self._after_pass, member),
            came=came,
            went=went,
            broke=broke,
        )
        await life.start(place)
        await online.wait()

    def _came(self, member: Member, span: Span) -> None:
        member.state, member.serves, member.online_since = "online", span, self._loop.time()

    def _note_work(self, member: Member) -> None:
        member.busy_s += _runner(self._cluster, member).busy_s
        member.online_s += self._loop.time() - member.online_since

    async def _churn(self, member: Member) -> None:
        churn = self._scenario.churn
        assert churn is not None
        # A Weibull law has the median scale * ln(2)^(1/shape).
        scale_s = churn.session_s / math.log(2) ** (1 / churn.shape)
        while True:
            await asyncio.sleep(member.rng.weibullvariate(scale_s, churn.shape))
            kind = member.rng.choice(churn.kinds)
            await self.leave(member, kind, member.rng.expovariate(math.log(2) / churn.away_s))
            if member.state == "away":
                await self.join(member)

    def _later(self, delay_s: float, member: Member) -> None:
        async def arrive() -> None:
            await asyncio.sleep(delay_s)
            await self.join(member)

        self._tasks.spawn(arrive(), f"arrival of {member.name}")

    # --- faults ---

    async def _inflict(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        victims = [member for member in self.members if fault.region in ("", member.place.region)]
        victims = [member for member in victims if member.state == "online"]
        if not fault.region:
            victims = self._rng.sample(victims, round(fault.share * len(victims)))
        if fault.kind == "partition":
            await self._part(victims, fault.for_s)
            return
        for member in victims:
            self._tasks.spawn(self._strike(member, fault), f"{fault.kind} of {member.name}")
            if fault.every_s:
                await asyncio.sleep(fault.every_s)

    async def _strike(self, member: Member, fault: Fault) -> None:
        if member.state != "online":
            return
        match fault.kind:
            case "slow":
                runner = _runner(self._cluster, member)
                runner.slowdown = fault.factor
                if fault.for_s:
                    await asyncio.sleep(fault.for_s)
                    runner.slowdown = 1.0
            case "skew":
                self._world.members[peer_of(member.name)].skew_s = fault.skew_s
                if fault.for_s:
                    await asyncio.sleep(fault.for_s)
                    self._world.members[peer_of(member.name)].skew_s = 0.0
            case kind:
                await self.leave(member, kind, fault.for_s)

    async def _part(self, victims: list[Member], for_s: float) -> None:
        group = [peer_of(member.name) for member in victims]
        self._world.partition(group, [peer for peer in self._world.members if peer not in set(group)], registry=True)
        for member in victims:
            member.state = "hung"
        if for_s:
            await asyncio.sleep(for_s)
            self._world.heal(*group)
            for member in victims:
                member.state = "online" if member.state == "hung" else member.state

    def _after_pass(self, member: Member) -> None:
        peer = self._cluster.peers.get(member.name)
        if peer is not None:
            self._invariants.after_pass(peer)


def _runner(cluster: SimCluster, member: Member) -> SimRunner:
    runner = cluster.peers[member.name].runner
    assert isinstance(runner, SimRunner)
    return runner


def _members(scenario: Scenario, seed: int) -> list[Member]:
    """Who they are depends on the seed and on nothing that happens."""
    peers, blocks = scenario.peers, scenario.model.blocks
    length = min(peers.blocks, blocks)
    rows = -(-blocks // length)
    found = []
    rng = Random(f"{seed}/peers")
    liars = [lie for lie in scenario.liars for _ in range(round(lie.share * peers.count))]
    lies: list[Liars | None] = [*liars, *[None] * max(0, peers.count - len(liars))]
    rng.shuffle(lies)
    steady = scenario.churn.steady if scenario.churn is not None else 1.0
    for index in range(peers.count):
        if peers.placement == "even":
            start = round((blocks - length) * (index % rows) / max(rows - 1, 1))
        else:
            start = rng.randrange(blocks - length + 1)
        factor = math.exp(rng.gauss(0.0, peers.spread)) if peers.spread else 1.0
        region = peers.regions[index % len(peers.regions)] if peers.regions else ""
        found.append(
            Member(
                name=f"peer{index}",
                place=Place(region, relayed=rng.random() < scenario.network.relayed),
                speed=Speed(peers.block_ms / 1000 * factor, peers.row_ms / 1000 * factor),
                span=None if peers.placement == "auto" else Span(start, start + length),
                lie=lies[index],
                steady=rng.random() < steady,
                rng=Random(f"{seed}/peer{index}"),
            )
        )
    return found


class Tongue:
    """What a liar says: changes its record on the way out; other values pass."""

    def __init__(self, lie: Liars, blocks: int) -> None:
        self._lie = lie
        self._blocks = blocks

    def __call__(self, topic: str, value: bytes) -> bytes:
        record = json.loads(value)
        if "block_seconds" not in record or record.get("state") != PeerState.ONLINE:
            return value
        factor = self._lie.factor if self._lie.claim == "fast" else 1 / self._lie.factor
        match self._lie.claim:
            case "fast" | "slow":
                record["block_seconds"] /= factor
                record["row_seconds"] /= factor
                record["throughput"] *= factor
            case "zero":
                record["block_seconds"] = record["row_seconds"] = 0.0
            case "infinite":
                record["throughput"] = float("inf")
            case "span":
                record["span"] = f"0:{self._blocks}"
            case "idle":
                record["active_sessions"] = record["queued_tokens"] = 0
                record["kv_free_tokens"] = record["kv_total_tokens"]
        lied = json.dumps(record, separators=(",", ":")).encode()
        return lied if len(lied) <= MAX_RECORD_BYTES else value
