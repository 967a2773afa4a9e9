"""Random schedules of faults under a running generation, each made from one seed.

    python -m tests.swarm.schedules 1234            replay a seed: what happens to whom, and how it ends
    python -m tests.swarm.schedules 0:5000          look for seeds that fail

A swarm has three peers for each range, sometimes one more that holds everything; one client generates: a prompt, steps,
a rollback now and then. Meanwhile peers die, hang, are cut off from the client or from each other, drain, come back
under the same identity, and the client's own connections break: at random moments, on purpose mostly to those whom the
generation depends on, and often two at once or one right behind the other, so that a replay is hit. Each range keeps a
peer in good health. What has to come out is what a single machine makes of the same rows, without a long wait; and at
last nobody holds anything.
"""

import asyncio
import random
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

from llmasos.client.session import Session
from llmasos.config import SESSION_LEASE_S, PeerConfig
from sim import stream
from sim.loop import run
from sim.network import SimSwarm, peer_of
from sim.runner import NUMBERS, from_numbers, reference, to_numbers
from sim.stream import Link
from sim.swarm import SimClient, SimCluster, SimModel

MODEL = SimModel(blocks=12)
RANGES = ("0:4", "4:9", "9:12")
REPLICAS = 3
MAX_WAIT_S = 25.0
"""Virtual seconds that some rows may take to come, whatever happens to up to two peers of each range meanwhile. (The
median of the longest wait of a schedule is 1 s; 99 of 100 stay under 7 s.)"""
PATIENCE_S = 400.0
"""Virtual seconds after which a generation that is still running hangs."""

KINDS = ("kill", "kill", "hang", "hang", "cut from client", "cut from peer", "restart", "drain", "reset")


@dataclass
class Schedule:
    """One seed's run: `play()` raises AssertionError when the promise is broken. `said` tells what happened."""

    seed: int
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.with_whole = self.rng.random() < 0.25
        self.harmed: dict[str, str] = {}  # name of a peer -> what it suffers from
        self.faults = asyncio.Event()
        self.failovers = 0
        self.longest_s = 0.0

    def play(self) -> None:
        window = self.rng.choice([stream.WINDOW_BYTES, 3_000])  # three chunks of a prompt, as with a real model
        with mock.patch.object(stream, "WINDOW_BYTES", window):
            run(self._main())

    def note(self, what: str) -> None:
        self.said.append(f"{asyncio.get_running_loop().time():8.3f} s  {what}")

    async def _main(self) -> None:
        rng = self.rng
        latency_s, jitter = rng.choice([0.0005, 0.005, 0.03]), rng.choice([0.0, 1.0, 5.0])
        world = SimSwarm(
            seed=rng.getrandbits(32),
            links=lambda source, target: Link(latency_s=latency_s, jitter=jitter),
            stale_s=rng.choice([0.0, 5.0]),
        )
        config = PeerConfig(drain_timeout_s=rng.choice([2.0, 30.0]))
        async with SimCluster(world, MODEL, config=config) as self.cluster:
            for name, span in self._names():
                await self.cluster.start(name, span)
            await asyncio.sleep(6)  # until all readers of the registry see them
            async with (
                self.cluster.client("client", seed=rng.getrandbits(32)) as self.client,
                asyncio.timeout(PATIENCE_S),
                asyncio.TaskGroup() as group,
            ):
                work = group.create_task(self._generate(self.client))
                trouble = group.create_task(self._trouble())
                work.add_done_callback(lambda _: trouble.cancel())
            self.world_heals()
            await asyncio.sleep(SESSION_LEASE_S + 1)
            self._check_nothing_is_held()

    def _names(self) -> Iterator[tuple[str, str]]:
        for index, span in enumerate(RANGES):
            for copy in range(REPLICAS):
                yield f"{'abc'[index]}{copy}", span
        if self.with_whole:
            yield "whole", "0:12"

    # --- the generation -----------------------------------------------------------------------------------------------

    async def _generate(self, client: SimClient) -> None:
        rng = self.rng
        held: list[int] = []
        async with client.session(1_024) as self.session:
            for _ in range(rng.randint(1, 3)):
                await self._forward(self.session, held, len(held), rng.choice([1, 5, 50, 200, 600]))
                for _ in range(rng.randint(5, 50)):
                    await self._forward(self.session, held, len(held), rng.choice([1, 1, 1, 4]))
                    if rng.random() < 0.05:
                        await asyncio.sleep(rng.choice([0.5, 6.0, 20.0]))  # a person reads
                if rng.random() < 0.3:
                    await self._forward(self.session, held, rng.randint(0, len(held)), 7)
                if len(held) > 400:
                    break
            self.failovers = self.session.failovers
        assert self.longest_s <= MAX_WAIT_S, f"some rows took {self.longest_s:.1f} s"
        self.note("done")

    async def _forward(self, session: Session, held: list[int], position: int, tokens: int) -> None:
        numbers = [self.rng.randrange(NUMBERS) for _ in range(tokens)]
        held[position:] = numbers
        keep = self.rng.choice([1, tokens])
        self.note(f"rows {position}:{len(held)} through {' '.join(map(self._name, session.route.peers))}")
        begin = asyncio.get_running_loop().time()
        answer = to_numbers(await session.forward(from_numbers(numbers), position=position, keep=keep))
        self.longest_s = max(self.longest_s, asyncio.get_running_loop().time() - begin)
        assert answer == reference(MODEL.blocks, held)[-keep:], (
            f"rows {position}:{len(held)} are not what one machine makes of them"
        )

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    async def _trouble(self) -> None:
        rng = self.rng
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        for _ in range(rng.randint(1, 10)):
            victim = self._victim()
            if victim is not None:
                await self._harm(victim, rng.choice(KINDS))
            # at the same time, within the replay that follows, or when all has settled
            await asyncio.sleep(rng.choice([0.0, rng.uniform(0.0, 0.3), rng.uniform(0.0, 1.0), rng.uniform(0.0, 8.0)]))
        await asyncio.sleep(PATIENCE_S)

    def _victim(self) -> str | None:
        """Somebody on the route, mostly; never the last healthy peer of a range."""
        on_route: list[str] = []
        if hasattr(self, "session"):
            on_route = [self._name(hop.plan.peer) for hop in self.session._hops]
        names = [name for name, _ in self._names()]
        chosen = self.rng.choice(on_route) if on_route and self.rng.random() < 0.85 else self.rng.choice(names)
        others = [name for name in names if name[0] == chosen[0] and name != chosen and name not in self.harmed]
        if chosen in self.harmed or (chosen != "whole" and not others):
            return None
        return chosen

    async def _harm(self, name: str, kind: str) -> None:
        rng, world, peer = self.rng, self.cluster.world, peer_of(name)
        self.note(f"{kind} {name}")
        self.harmed[name] = kind
        match kind:
            case "kill":
                self.cluster.kill(name)
            case "hang":
                world.hang(peer)
                self._heal_later(name, rng.choice([0.3, 2.0, 6.0, 25.0, 1e6]))
            case "cut from client":
                world.partition(self.client.network.peer_id, peer)
                self._heal_later(name, rng.choice([0.3, 2.0, 6.0, 25.0]))
            case "cut from peer":
                other = rng.choice([other for other, _ in self._names() if other != name])
                self.said[-1] += f" ({other})"
                world.partition(peer, peer_of(other))
                self._heal_later(name, rng.choice([0.3, 2.0, 25.0, 1e6]))
            case "restart":
                self.cluster.kill(name)
                self._later(rng.choice([0.0, 0.05, 1.0, 10.0]), lambda: self._come_back(name))
            case "drain":
                self._later(0.0, lambda: self.cluster.stop(name))
            case "reset":
                del self.harmed[name]
                for ours in list(self.client.network.streams):
                    if ours.peer == peer or rng.random() < 0.3:
                        ours.shut("reset")

    async def _come_back(self, name: str) -> None:
        self.note(f"{name} is back")
        span = dict(self._names())[name]
        await self.cluster.start(name, span, network=self.cluster.world.restart(peer_of(name)))
        self.harmed.pop(name, None)

    def _heal_later(self, name: str, after_s: float) -> None:
        async def heal() -> None:
            self.note(f"{name} heals")
            self.cluster.world.heal(peer_of(name))
            self.harmed.pop(name, None)

        self._later(after_s, heal)

    def _later(self, after_s: float, work: Callable[[], Awaitable[object]]) -> None:
        async def wait() -> None:
            await asyncio.sleep(after_s)
            await work()

        self.cluster._sweeping.spawn(wait(), "what comes later")

    # --- the end ------------------------------------------------------------------------------------------------------

    def world_heals(self) -> None:
        self.cluster.world.heal()

    def _check_nothing_is_held(self) -> None:
        for name, peer in self.cluster.peers.items():
            scheduler = peer.engine.scheduler
            scheduler.check()
            assert peer.handler.sessions == 0, f"{name} still has {peer.handler.sessions} sessions"
            assert scheduler.kv_free_tokens == scheduler.kv_tokens, f"{name} leaks kv"
            assert not peer.runner._caches, f"{name} leaks caches"
            assert not peer.engine._pending, f"{name} leaks steps"
        assert not self.client.network.streams, "the client has streams left"
        health = self.client.router.health
        assert len(health.tickets) == 0, "the client believes in sessions of its own"

    def _name(self, peer: str) -> str:
        return next(name for name, _ in self._names() if peer_of(name) == peer)


def failure(seed: int) -> str | None:
    """What went wrong with a seed, if anything did: the story, the error, and how to see it again."""
    schedule = Schedule(seed)
    try:
        schedule.play()
    except Exception as error:  # noqa: BLE001 - whatever it is, the seed has to be told
        story = "\n".join(schedule.said[-25:])
        trace = "".join(traceback.format_exception(error))[-2500:]
        return f"seed {seed}:\n{story}\n{trace}\nreplay: python -m tests.swarm.schedules {seed}"
    return None


def main(argument: str) -> int:
    """The command line."""
    first, _, last = argument.partition(":")
    seeds = range(int(first), int(last or int(first) + 1))
    bad = 0
    failovers = 0
    stalls: list[tuple[float, int]] = []
    for seed in seeds:
        schedule = Schedule(seed)
        try:
            schedule.play()
            failovers += schedule.failovers
            stalls.append((schedule.longest_s, seed))
        except Exception as error:  # noqa: BLE001
            bad += 1
            sys.stdout.write(f"seed {seed}: {''.join(traceback.format_exception_only(error)).strip()[:300]}\n")
            if isinstance(error, BaseExceptionGroup):
                sys.stdout.write(f"   {error.exceptions}\n")
            sys.stdout.flush()
        if len(seeds) == 1:
            sys.stdout.write("\n".join(schedule.said) + "\n" + (failure(seed) or "") + "\n")
    sys.stdout.write(f"{len(seeds)} seeds, {bad} failed, {failovers} failovers\n")
    stalls.sort()
    for share in (0.5, 0.9, 0.99, 1.0):
        longest_s, seed = stalls[min(int(share * len(stalls)), len(stalls) - 1)]
        sys.stdout.write(f"  the longest wait for rows: {longest_s:.1f} s at {share:.0%} (seed {seed})\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
