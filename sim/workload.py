"""The clients of a scenario: what they ask for, and what they got.

A client sends one request after the other. A request is a prompt and a number of tokens; each token that comes back is
compared with what a single machine gives, and is the input of the next one, as in real decoding. What the swarm refuses
for the time being is tried again for `patience_s`, as a person or a gateway would.

Times are those of whoever reads the text: a try that begins anew repeats what is known already, which counts for
nothing, and the first token behind it is as late as the one before is old. Who gives up without a token has waited so
long for the first.
"""

import asyncio
from array import array
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from random import Random

from llmasos.client.router import Policy
from llmasos.errors import LLMasOSError
from sim.invariants import Invariants
from sim.network import peer_of
from sim.population import Population
from sim.regions import Place
from sim.runner import NUMBERS, Reference, from_numbers, to_numbers
from sim.scenario import Crowd, Scenario
from sim.swarm import SimClient, SimCluster

RETRY_S = 1.0
"""First pause before a refused request is tried again; it doubles up to MAX_RETRY_S."""
MAX_RETRY_S = 8.0


@dataclass(slots=True)
class Totals:
    """What happened since the last look; the timeline is made of these."""

    tokens: int = 0
    done: int = 0
    failed: int = 0
    token_s: "array[float]" = field(default_factory=lambda: array("d"))


@dataclass(slots=True)
class Measured:
    """What all clients have seen."""

    started: int = 0
    done: int = 0
    failed: int = 0
    excused: int = 0
    """Of those: some block had no peer while they tried."""
    refused: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    failovers: int = 0
    replayed_tokens: int = 0
    hops: int = 0
    first_token_s: "array[float]" = field(default_factory=lambda: array("d"))
    token_s: "array[float]" = field(default_factory=lambda: array("d"))
    errors: dict[str, int] = field(default_factory=dict)
    lately: Totals = field(default_factory=Totals)

    def take(self) -> Totals:
        """The totals since the last call."""
        lately, self.lately = self.lately, Totals()
        return lately


@dataclass(slots=True)
class Text:
    """One request, and how far whoever asked for it has read."""

    who: str
    prompt: Sequence[int]
    new_tokens: int
    begun_at: float
    read: int = 0
    read_at: float = 0.0
    """When the last of those came."""


class Gateway:
    """A process with several clients: one view of the swarm, one memory of what peers did."""

    def __init__(self, name: str, client: SimClient) -> None:
        self.name = name
        self.client = client
        self.active = 0
        self._busy_until: list[float] = []

    def hops(self, hops_each: int, now: float) -> int:
        """An upper bound of the hops of the sessions that run, or ran within the last ten seconds."""
        self._busy_until = [moment for moment in self._busy_until if moment > now]
        return (self.active + len(self._busy_until)) * hops_each

    def began(self) -> None:
        """A session begins."""
        self.active += 1

    def ended(self, now: float) -> None:
        """A session is over."""
        self.active -= 1
        self._busy_until.append(now + 10.0)


class Workload:
    """Runs the clients. `run` returns when the time is over and every request has ended."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        cluster: SimCluster,
        invariants: Invariants,
        policy: Callable[[str], Policy | None],
    ) -> None:
        """`policy` gives each gateway, by its peer id, its way to choose routes."""
        self.measured = Measured()
        self.gateways: list[Gateway] = []
        self._scenario = scenario
        self._seed = seed
        self._cluster = cluster
        self._invariants = invariants
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._stack = AsyncExitStack()
        self._rng = Random(f"{seed}/gateways")

    @property
    def active(self) -> int:
        """Requests that are under way."""
        return sum(gateway.active for gateway in self.gateways)

    def places(self) -> list[str]:
        """The names of the gateways, which are members of the network like peers."""
        scenario = self._scenario
        most = scenario.clients.count + max((crowd.clients for crowd in scenario.crowds), default=0)
        return [f"gateway{index}" for index in range(-(-most // scenario.clients.per_gateway))]

    def place(self, index: int) -> Place:
        """Where a gateway is: in one of the clients' regions, or of the peers'."""
        regions = self._scenario.clients.regions or self._scenario.peers.regions
        return Place(regions[index % len(regions)]) if regions else Place()

    async def run(self, population: Population) -> None:
        """All clients, from now until `duration_s` have passed, and their last requests."""
        end = self._loop.time() + self._scenario.duration_s
        async with self._stack:
            for name in self.places():
                client = await self._stack.enter_async_context(
                    self._cluster.client(name, seed=self._rng.getrandbits(32), policy=self._policy(peer_of(name)))
                )
                self.gateways.append(Gateway(name, client))
            work = [self._live(index, 0.0, end) for index in range(self._scenario.clients.count)]
            for crowd in self._scenario.crowds:
                work += self._crowd(crowd, end)
            tasks = [asyncio.create_task(one, name=f"client {index}") for index, one in enumerate(work)]
            try:
                await asyncio.sleep(end - self._loop.time())
                await population.end()
                if tasks:
                    _, late = await asyncio.wait(tasks, timeout=self._scenario.settle_s)
                    stuck = [task for task in tasks if task in late]
                    self._invariants.require(
                        not stuck,
                        f"{len(stuck)} requests have not ended {self._scenario.settle_s:g} s after the last one began",
                    )
                    for task in tasks:
                        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                            raise error
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _crowd(self, crowd: Crowd, end: float) -> list[Coroutine[None, None, None]]:
        begin = self._loop.time() + crowd.at_s
        first = self._scenario.clients.count
        last = min(begin + crowd.for_s, end)
        return [self._live(first + index, crowd.at_s, last) for index in range(crowd.clients)]

    async def _live(self, index: int, delay_s: float, until: float) -> None:
        """One client's requests, one after the other."""
        clients = self._scenario.clients
        rng = Random(f"{self._seed}/client{index}")
        gateway = self.gateways[index % len(self.gateways)]
        await asyncio.sleep(delay_s + clients.pause_s * rng.random())
        while self._loop.time() < until:
            # (2^60 is no modulus of ours any more: with it a seed asks for the texts that it always asked for.)
            prompt = [rng.randrange(2**60) % NUMBERS for _ in range(rng.randint(*clients.prompt_tokens))]
            await self._request(gateway, f"client {index}", prompt, rng.randint(*clients.new_tokens), rng)
            await asyncio.sleep(rng.expovariate(1 / clients.pause_s) if clients.pause_s else 0.0)

    async def _request(self, gateway: Gateway, who: str, prompt: Sequence[int], new_tokens: int, rng: Random) -> None:
        """One request to its end, through as many tries as patience lasts."""
        measured = self.measured
        measured.started += 1
        text = Text(who, prompt, new_tokens, self._loop.time())
        pause_s = RETRY_S
        while True:
            gateway.began()
            try:
                await self._generate(gateway, text)
            except LLMasOSError as error:
                name = type(error).__name__
                measured.errors[name] = measured.errors.get(name, 0) + 1
                self._invariants.require(error.retryable, f"{who}: an error that cannot be tried again: {error}")
                waited_s = self._loop.time() - text.begun_at
                if waited_s + pause_s > self._scenario.clients.patience_s:
                    measured.failed += 1
                    measured.excused += self._invariants.last_gap_at >= text.begun_at - 1.0  # looked for once a second
                    measured.lately.failed += 1
                    if not text.read:
                        measured.first_token_s.append(waited_s)
                    return
                measured.refused += 1
            else:
                measured.done += 1
                measured.lately.done += 1
                return
            finally:
                gateway.ended(self._loop.time())
            await asyncio.sleep(pause_s * (0.5 + rng.random()))
            pause_s = min(2 * pause_s, MAX_RETRY_S)

    async def _generate(self, gateway: Gateway, text: Text) -> None:
        measured, loop = self.measured, self._loop
        reference = Reference(self._scenario.model.blocks)
        expected = reference.feed(text.prompt)
        promised_s = self._scenario.promises.stall_s
        session = gateway.client.session(len(text.prompt) + text.new_tokens, len(text.prompt))
        try:
            async with session:
                rows = from_numbers(text.prompt)
                for count in range(text.new_tokens):
                    asked = loop.time()
                    [got] = to_numbers(await session.forward(rows))
                    now = loop.time()
                    self._invariants.answered(text.who, session.length, got, expected)
                    if now - asked > promised_s:
                        self._invariants.violate(
                            f"{text.who}: a token took {now - asked:.1f} s; {promised_s:g} s at most"
                        )
                    if count == text.read:
                        self._note(text, now)
                    if count + 1 < text.new_tokens:
                        rows = from_numbers([got])
                        expected = reference.feed([got])
                self._invariants.require(
                    session.length == len(text.prompt) + text.new_tokens - 1,
                    f"{text.who}: the session holds {session.length} rows",
                )
                measured.hops += len(session.route.hops)
            measured.prompt_tokens += len(text.prompt)
        finally:
            measured.failovers += session.failovers
            measured.replayed_tokens += session.replayed_tokens

    def _note(self, text: Text, now: float) -> None:
        """The next token of a text has come, for the first time."""
        measured = self.measured
        if text.read == 0:
            measured.first_token_s.append(now - text.begun_at)
        else:
            measured.token_s.append(now - text.read_at)
            measured.lately.token_s.append(now - text.read_at)
        text.read, text.read_at = text.read + 1, now
        measured.tokens += 1
        measured.lately.tokens += 1
