"""One run: a scenario, a seed and a policy in, a report out. The same three give the same report, bit for bit."""

import asyncio
import gc
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from llmasos.config import SESSION_LEASE_S, PeerConfig
from llmasos.span import Span
from sim.baselines import flow_rows_per_s, make_policy
from sim.invariants import ErrorWatch, Invariants, ViolationError
from sim.loop import VirtualLoop
from sim.loop import run as run_virtually
from sim.network import SimSwarm
from sim.population import Population
from sim.regions import Map
from sim.report import Latency, PeerUse, Report, Sample
from sim.runner import ROW_BYTES
from sim.scenario import Scenario
from sim.swarm import SimCluster, SimModel
from sim.workload import Workload

BEGIN_S = 100_000.0
"""The clock's first moment: clocks that are wrong by hours still show a time after zero."""
CHECK_EACH_S = 5
"""How often the whole account of each peer is looked at beside the checks at its passes, virtual seconds."""
MANY_OBJECTS = 1_000_000
"""So many more than at the last sweep have to be there for the next one, which looks at all of them (0.5 s)."""
SAMPLES = 240
"""Points of the timeline, at most one a second."""


def replay_command(scenario: Scenario, seed: int, source: str) -> str:
    """What to type to see the same run again."""
    return (
        f"python -m sim run {source} --peers {scenario.peers.count} --clients {scenario.clients.count} "
        f"--duration {scenario.duration_s:g} --seed {seed}"
    )


def simulate(
    scenario: Scenario,
    seed: int,
    *,
    policy: str = "ours",
    source: str = "",
    thorough: bool = True,
    debug: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> Report:
    """Run a scenario to its end in virtual time. A violation is in the report, not raised.

    `policy` (see `sim.baselines`) chooses the routes; `thorough` checks whole accounts at each pass; `progress` hears
    the share that is done.
    """
    begin, cpu = time.perf_counter(), time.process_time()
    settings = _Settings(scenario, seed, policy, thorough, debug, progress)
    replay = replay_command(scenario, seed, source or scenario.name)
    with _few_collections():
        report = run_virtually(_run(settings, replay), start=BEGIN_S)
    report.real_s, report.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    report.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return report


@dataclass(frozen=True, slots=True)
class _Settings:
    """What `simulate` was asked for."""

    scenario: Scenario
    seed: int
    policy: str
    thorough: bool
    debug: bool
    progress: Callable[[float], None]


async def _run(settings: _Settings, replay: str) -> Report:
    scenario, seed = settings.scenario, settings.seed
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    invariants = Invariants(replay, thorough=settings.thorough)
    loop.set_exception_handler(invariants.task_failed)
    network = scenario.network
    where = Map(bytes_per_s=network.bytes_per_s, jitter=network.jitter, loss=network.loss)
    world = SimSwarm(
        seed=seed,
        links=where.link,
        lookup_s=network.lookup_ms / 1000,
        stale_s=network.stale_s,
        row_scale=scenario.model.row_bytes / ROW_BYTES,
    )
    model = SimModel("simulated", scenario.model.blocks, scenario.model.context_tokens, scenario.model.row_bytes)
    config = PeerConfig(drain_timeout_s=scenario.peers.drain_timeout_s)
    watch = ErrorWatch(invariants)
    with _logging(watch, loop, debug=settings.debug):
        async with SimCluster(world, model, config=config) as cluster:
            population = Population(scenario, seed, cluster, invariants)
            policy = partial(make_policy, settings.policy, where)
            workload = Workload(scenario, seed, cluster, invariants, policy)
            for member in population.members:
                where.put(member.name, member.place)
            for index, name in enumerate(workload.places()):
                where.put(name, workload.place(index))
            run = _Run(settings, cluster, population, workload, invariants)
            report = await run.to_the_end()
            report.trace = world.trace.digest
            report.events = world.trace.frames
    report.turns = loop.turns
    return report


class _Run:
    """The conductor: starts everybody, looks at the clock, writes the report."""

    def __init__(
        self,
        settings: _Settings,
        cluster: SimCluster,
        population: Population,
        workload: Workload,
        invariants: Invariants,
    ) -> None:
        self._scenario = scenario = settings.scenario
        self._progress = settings.progress
        self._cluster = cluster
        self._population = population
        self._workload = workload
        self._invariants = invariants
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None
        self._ended: float | None = None
        self._bounds: list[float] = []
        self._peers: list[tuple[Span, float]] = []  # span and block-rows a second of those that are there, …
        self._rows_per_s = 0.0  # … and the most rows a second that they could carry
        self._report = Report(
            scenario=scenario.name,
            title=scenario.title,
            policy=settings.policy,
            seed=settings.seed,
            peers=scenario.peers.count,
            clients=scenario.clients.count,
            blocks=scenario.model.blocks,
            duration_s=scenario.duration_s,
        )

    async def to_the_end(self) -> Report:
        """The run, until it is over or something is violated."""
        work = asyncio.create_task(self._play(), name="the scenario")
        ticks = asyncio.create_task(self._tick(), name="the clock")
        try:
            await asyncio.wait([work, ticks, self._invariants.broken], return_when=asyncio.FIRST_COMPLETED)
            for done in (self._invariants.broken, work, ticks):
                if done.done():
                    done.result()
        except ViolationError as error:
            self._report.violations.append(error.message)
            self._report.replay = error.hint
        finally:
            for task in (work, ticks):
                task.cancel()
            await asyncio.gather(work, ticks, return_exceptions=True)
            await self._population.end()
            if self._invariants.broken.done():
                self._invariants.broken.exception()
        self._write()
        return self._report

    async def _play(self) -> None:
        await self._population.begin()
        self._began = self._loop.time()
        await self._workload.run(self._population)
        # Nobody is left: a lease later, nothing may be left of anybody.
        self._ended = self._loop.time()
        await asyncio.sleep(SESSION_LEASE_S + 1.0)
        for member in self._population.members:
            if member.state == "online":
                self._invariants.is_idle(self._cluster.peers[member.name])
        promised, measured = self._scenario.promises.failed_share, self._workload.measured
        unexcused = measured.failed - measured.excused
        self._invariants.require(
            unexcused <= promised * measured.started,
            f"{unexcused} of {measured.started} requests failed though every block had a peer; {promised:.1%} are "
            f"promised at most: {measured.errors}",
        )
        self._invariants.require(
            measured.started == measured.done + measured.failed,
            f"{measured.started} requests began, {measured.done} were answered and {measured.failed} failed",
        )

    async def _tick(self) -> None:
        """Each virtual second: what no single event shows."""
        every = max(1, round(self._scenario.duration_s / SAMPLES))
        hops = 2 * -(-self._scenario.model.blocks // min(self._scenario.peers.blocks, self._scenario.model.blocks)) + 1
        second = 0
        while True:
            await asyncio.sleep(1.0)
            if self._began is None:
                continue
            now = self._loop.time()
            counts = self._population.coverage()
            self._invariants.coverage(counts, self._scenario.promises.coverage_s)
            self._invariants.count_connects(
                {
                    gateway.name: (gateway.client.network.connects, gateway.hops(hops, now))
                    for gateway in self._workload.gateways
                }
            )
            for member in self._population.members[second % CHECK_EACH_S :: CHECK_EACH_S]:
                peer = self._cluster.peers.get(member.name)
                if peer is not None and member.state == "online":
                    self._invariants.check_peer(peer)
            second += 1
            self._progress(min(1.0, second / self._scenario.duration_s))
            if second % every == 0 and self._ended is None:
                self._sample(now, counts, every)

    def _bound_tokens_per_s(self) -> float:
        """What the peers that are there now could carry at most, in the largest batches that the clients could fill."""
        clients = self._scenario.clients.count + max((crowd.clients for crowd in self._scenario.crowds), default=0)
        rows = max(1, min(clients * 2, self._cluster.config.max_batch_tokens))  # of one pass, prompts included
        peers = [
            (member.serves, rows / (member.speed.first_row_s + (rows - 1) * member.speed.row_s))
            for member in self._population.members
            if member.state == "online" and member.serves is not None
        ]
        if peers != self._peers:  # else nobody has come or gone since the last look
            self._peers, self._rows_per_s = peers, flow_rows_per_s(peers, self._scenario.model.blocks)
        rows_per_s = self._rows_per_s
        measured = self._workload.measured
        rows = measured.tokens + measured.prompt_tokens
        return rows_per_s * measured.tokens / rows if rows else rows_per_s

    def _sample(self, now: float, counts: list[int], every: int) -> None:
        lately = self._workload.measured.take()
        states = self._population.count()
        assert self._began is not None
        self._bounds.append(self._bound_tokens_per_s())
        self._report.timeline.append(
            Sample(
                at_s=round(now - self._began, 3),
                online=states["online"],
                hung=states["hung"],
                joining=states["joining"],
                leaving=states["leaving"],
                away=states["away"],
                weakest_block_peers=min(counts),
                missing_blocks=sum(count == 0 for count in counts),
                active=self._workload.active,
                tokens_per_s=lately.tokens / every,
                token=Latency.of(lately.token_s),
                failed=lately.failed,
            )
        )

    def _write(self) -> None:
        report, measured = self._report, self._workload.measured
        report.requests, report.done, report.failed = measured.started, measured.done, measured.failed
        report.refused, report.errors = measured.refused, dict(sorted(measured.errors.items()))
        report.tokens, report.prompt_tokens = measured.tokens, measured.prompt_tokens
        lasted_s = (self._ended or self._loop.time()) - (self._began or self._loop.time())
        report.virtual_s = round(lasted_s, 6)
        report.tokens_per_s = measured.tokens / lasted_s if lasted_s else 0.0
        report.bound_tokens_per_s = fmean(self._bounds) if self._bounds else 0.0
        report.first_token = Latency.of(measured.first_token_s)
        report.token = Latency.of(measured.token_s)
        report.failovers, report.replayed_tokens = measured.failovers, measured.replayed_tokens
        report.hops = measured.hops / measured.done if measured.done else 0.0
        report.longest_gap_s = self._invariants.longest_gap_s
        report.checks = self._invariants.checks
        for member in self._population.members:
            if member.lives:
                used = self._population.utilisation(member)
                report.peers_used.append(
                    PeerUse(member.name, str(member.serves or ""), round(used, 6), member.place.relayed)
                )
        report.moves = sum(member.moves for member in self._population.members)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Almost all that a simulation makes dies by itself; looking for cycles each 700 objects costs a third.

    What a run leaves behind is full of cycles. It is swept before the next run, or goes with the process: a sweep of it
    takes seconds.
    """
    before = gc.get_threshold()
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(MANY_OBJECTS, 20, 20)
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*before)


@contextmanager
def _logging(watch: ErrorWatch, loop: VirtualLoop, *, debug: bool) -> Iterator[None]:
    """Errors of the shipped code go to the judge; with `debug` all is shown, with the virtual time."""
    names = ("llmasos", "sim", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.propagate) for logger in loggers]
    handlers: list[logging.Handler] = [watch]
    if debug:
        shown = logging.StreamHandler(sys.stderr)
        shown.setFormatter(_VirtualTime(loop))
        handlers.append(shown)
    for logger in loggers:
        logger.setLevel(logging.DEBUG if debug and logger.name != "asyncio" else logging.ERROR)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            for handler in handlers:
                logger.removeHandler(handler)


class _VirtualTime(logging.Formatter):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def format(self, record: logging.LogRecord) -> str:
        task = asyncio.current_task(self._loop) if self._loop.is_running() else None
        who = task.get_name() if task else "-"
        return f"{self._loop.time() - BEGIN_S:12.6f}  {who:24}  {record.getMessage()}"
