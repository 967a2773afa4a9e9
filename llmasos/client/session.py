"""One generation's life through the swarm: rows go in at the first hop, the last hop's rows come back.

The client owns the session. It knows every row that it has sent, each hop knows every row that it has passed on, and a
position below what is cached rolls a hop back. Three consequences make up all of failover:

  * a hop that is lost is replaced by peers that hold the same blocks;
  * the hop before the gap (the client, before the first) sends the newcomers what they have to catch up with;
  * the steps that were in the air are sent again, from the first position that was not answered.

No row that was answered is computed anew outside the gap, and since a block's output depends on nothing but its input,
the text goes on as it would have.

    a hop:   lagging ──caught up──▶ live ──its stream ends, or it is silent──▶ lost ──replaced──▶ gone
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from llmasos.client.hop import HopLink, as_error
from llmasos.client.router import Router
from llmasos.config import PING_EVERY_S, ClientConfig
from llmasos.errors import LLMasOSError, PeerError, PeerFaultError, PeerTimeoutError, UsageError
from llmasos.history import History
from llmasos.network import Network
from llmasos.routing.planner import Route, RouteRequest
from llmasos.span import Span, gaps
from llmasos.tasks import TaskSet
from llmasos.wire import AnyMessage, Failed, Open, Pong, Replay, Reroute, Result, Step, Tensor, join_rows

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _InFlight:
    """A step that has no answer yet. `replay` hops from the index `first` on take part when it is a replay."""

    position: int
    keep: int
    answer: asyncio.Future[Tensor]
    first: int = 0
    replay: int = 0


class Session:
    """An open chain of hops. An async context manager; one `forward` at a time.

    `request.kv_tokens` is what each hop reserves for the session.
    """

    def __init__(self, network: Network, router: Router, request: RouteRequest, config: ClientConfig) -> None:
        if request.model_blocks is None:
            raise ValueError("a session must know how many blocks its model has")
        self.failovers = 0
        self.replayed_tokens = 0
        self._network = network
        self._router = router
        self._request = request
        self._blocks = request.model_blocks
        self._config = config
        self._id = router.new_session_id()
        self._hops: list[HopLink] = []
        self._inputs = History()
        self._answered = 0  # positions below this are answered, and cached on every hop that is not lagging
        self._in_flight: dict[int, _InFlight] = {}
        self._steps = itertools.count()
        self._names = itertools.count()
        self._tasks = TaskSet()

    @property
    def length(self) -> int:
        """How many positions have been answered."""
        return self._answered

    @property
    def route(self) -> Route:
        """The hops that serve the session now."""
        return Route(tuple(hop.plan for hop in self._hops))

    async def __aenter__(self) -> Self:
        """Build a route and open a session on each of its hops. Raises MissingBlocksError when there is none."""
        self._tasks.spawn(self._keep_alive(), f"pings of session {self._id}")
        try:
            await self._until_it_works(self._mend)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the session on every hop. May be called twice."""
        hops, self._hops = self._hops, []
        await self._tasks.close()
        await asyncio.gather(*(self._leave(hop) for hop in hops))
        self._forget_in_flight()

    async def forward(self, rows: Tensor, *, position: int | None = None, keep: int = 1) -> Tensor:
        """Send `rows`, (tokens, hidden), through all blocks; returns the last `keep` of what comes out.

        They take the positions from `position` on (by default behind the last): a lower one rolls the session back.
        Raises MissingBlocksError when a lost hop cannot be replaced, UsageError when a peer refuses the rows.
        """
        start = self._answered if position is None else position
        if not 0 <= start <= self._answered:
            raise UsageError(f"position {start} leaves a hole: the session holds {self._answered} positions")
        if rows.tokens == 0:
            return rows
        self._inputs.write(start, rows)
        self._answered = start
        kept: list[Tensor] = []
        await self._until_it_works(lambda: self._advance(keep, kept))
        return join_rows(kept) if kept else rows.rows(0, 0)

    # --- steps -------------------------------------------------------------------------------------------------------

    async def _advance(self, keep: int, kept: list[Tensor]) -> None:
        """Send all that is not answered, every chunk at once so that all hops have work; take answers in order."""
        await self._mend()
        loop = asyncio.get_running_loop()
        begin, end = loop.time(), self._inputs.length
        decoding = end - self._answered == 1
        steps: list[tuple[int, int]] = []  # number, and the position behind it
        for position, rows in self._inputs.chunks(self._answered, end, self._config.prompt_chunk_tokens):
            behind = position + rows.tokens
            kept_rows = min(max(behind - (end - keep), 0), rows.tokens)
            steps.append((await self._send_step(position, rows, kept_rows), behind))
        for number, behind in steps:
            answer = await self._answer(number)
            if answer.tokens:
                kept.append(answer)
            self._answered = behind
        if decoding:
            self._router.saw_step([(hop.plan.peer, len(hop.plan.span)) for hop in self._hops], loop.time() - begin)

    async def _send_step(self, position: int, rows: Tensor, keep: int, replay: int = 0) -> int:
        number = next(self._steps)
        self._expect(number, _InFlight(position, keep, self._new_answer(), replay=replay))
        step = Step(step=number, position=position, keep=keep, hidden=rows, replay=replay)
        await self._send(self._hops[0], step)
        return number

    def _new_answer(self) -> asyncio.Future[Tensor]:
        return asyncio.get_running_loop().create_future()

    def _expect(self, number: int, flight: _InFlight) -> None:
        self._in_flight[number] = flight

    async def _answer(self, number: int) -> Tensor:
        """Wait for a step. When it is late, look for hops that are silent; those that answer are waited for longer."""
        flight = self._in_flight[number]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.step_timeout_s
        while True:
            done, _ = await asyncio.wait([flight.answer], timeout=self._config.suspect_after_s)
            if done:
                del self._in_flight[number]
                return flight.answer.result()
            await self._probe(self._hops)
            if loop.time() > deadline:
                for hop in self._hops:  # all answer pings, yet the step is gone: trust none of them with it again
                    self._lose(hop, PeerTimeoutError(hop.plan.peer, f"no step in {self._config.step_timeout_s:g} s"))

    def _forget_in_flight(self) -> None:
        for flight in self._in_flight.values():
            if not flight.answer.cancel() and not flight.answer.cancelled():
                flight.answer.exception()  # seen: asyncio reports those that nobody looked at
        self._in_flight.clear()

    # --- failover ----------------------------------------------------------------------------------------------------

    async def _until_it_works(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """An attempt ends with the first peer that fails; the next one begins by mending the route."""
        for left in reversed(range(self._config.max_failovers)):
            try:
                return await attempt()
            except PeerError as error:
                log.info("session %s: %s", self._id, error.message)
                if left == 0:
                    raise
            finally:
                self._forget_in_flight()
        return None

    async def _mend(self) -> None:
        """Make every hop live: relay past broken links, replace what is lost, let newcomers catch up."""
        for index, hop in enumerate(self._hops):
            if hop.cut_off:
                await self._bridge(index)
        while True:
            standing = [hop.plan.span for hop in self._hops if hop.lost is None]
            missing = gaps(standing, self._blocks)
            if missing:
                await self._replace(missing)
                continue
            lagging = [index for index, hop in enumerate(self._hops) if hop.lagging]
            if not lagging:
                return
            first = lagging[0]
            count = next((n for n, index in enumerate(lagging) if index != first + n), len(lagging))
            await self._catch_up(first, count)

    async def _bridge(self, index: int) -> None:
        """A hop cannot reach the next one. If we can, we relay; if we cannot either, that one is lost."""
        hop, following = self._hops[index], self._hops[index + 1]
        hop.cut_off = False
        await self._probe([following])
        if following.lost is None:
            log.info("session %s: relaying from block %d on", self._id, hop.plan.span.end)
            hop.relay = True
            await self._rewire([hop, following])

    async def _replace(self, missing: list[Span]) -> None:
        """Put new hops where blocks are missing, open them, and tell their neighbours."""
        lost = [hop for hop in self._hops if hop.lost is not None]
        if lost:
            self.failovers += 1
        self._hops = [hop for hop in self._hops if hop.lost is None]
        await asyncio.gather(*(self._leave(hop) for hop in lost))
        planned = await self._router.plan(self._request, missing, patient=self._answered > 0)
        newcomers = [HopLink(plan, f"{self._id}.{next(self._names)}") for plan in planned]
        self._hops = sorted([*self._hops, *newcomers], key=lambda hop: hop.plan.span)
        beside = [
            hop
            for index, hop in enumerate(self._hops)
            if hop not in newcomers and any(other in newcomers for other in self._hops[max(index - 1, 0) : index + 2])
        ]
        for hop in beside:
            hop.relay = False
        await asyncio.gather(*(self._open(hop) for hop in newcomers))
        await self._rewire(beside)
        errors = [hop.lost for hop in newcomers if hop.lost is not None]
        if errors:
            raise errors[0]

    async def _open(self, hop: HopLink) -> None:
        """Open the session on a new hop; it is lost at once when that fails."""
        sides = self._sides(hop)
        request = Open(
            session=hop.session,
            digest=self._request.digest,
            dtype=self._config.dtype,
            start=hop.plan.span.start,
            end=hop.plan.span.end,
            tokens=self._request.kv_tokens,
            upstream=sides.upstream,
            downstream=sides.downstream,
        )
        try:
            await hop.open(self._network, request, self._config.open_timeout_s)
            await hop.send_ping()
        except PeerError as error:
            self._lose(hop, error)
        else:
            hop.ticket = self._router.opened(hop.plan.peer, self._request.kv_tokens)
            self._tasks.spawn(self._listen(hop), f"answers of {hop.session}")

    async def _rewire(self, hops: list[HopLink]) -> None:
        for hop in hops:
            await self._send(hop, self._sides(hop))

    def _sides(self, hop: HopLink) -> Reroute:
        """From whom a hop takes steps and to whom it sends them, as the route stands."""
        index = self._hops.index(hop)
        before = self._hops[index - 1] if index else None
        after = self._hops[index + 1] if index + 1 < len(self._hops) else None
        return Reroute(
            upstream=before.plan.peer if before is not None and not before.relay else None,
            downstream=after.as_next if after is not None and not hop.relay else None,
            relay=hop.relay,
        )

    async def _catch_up(self, first: int, count: int) -> None:
        """Let the hops `[first, first + count)` compute what has been answered, from what the hop before them sent."""
        until, chunk = self._answered, self._config.prompt_chunk_tokens
        if until:
            numbers: list[int] = []
            if first == 0:
                for position, rows in self._inputs.chunks(0, until, chunk):
                    numbers.append(await self._send_step(position, rows, keep=0, replay=count))
            else:
                numbers = [next(self._steps) for _ in range(0, until, chunk)]
                for index, number in enumerate(numbers):
                    self._expect(number, _InFlight(index * chunk, 0, self._new_answer(), first, count))
                request = Replay(step=numbers[0], until=until, chunk=chunk, hops=count)
                await self._send(self._hops[first - 1], request)
            for number in numbers:
                await self._answer(number)
            self.replayed_tokens += until
        for hop in self._hops[first : first + count]:
            hop.lagging = False

    # --- what the hops say -------------------------------------------------------------------------------------------

    async def _listen(self, hop: HopLink) -> None:
        """Take a hop's messages until it is lost."""
        try:
            while True:
                await self._hear(hop, await hop.receive())
        except PeerError as error:
            self._lose(hop, error)

    async def _hear(self, hop: HopLink, message: AnyMessage) -> None:
        match message:
            case Pong():
                self._router.saw_rtt(hop.plan.peer, hop.hear_pong())
            case Result():
                flight = self._in_flight.get(message.step)
                if flight is None or flight.answer.done():
                    return  # of a step that has been sent anew since
                if hop.relay:
                    await self._pass_on(hop, message, flight)
                else:
                    flight.answer.set_result(message.hidden)
            case Failed(code="next_hop_lost") if message.step in self._in_flight:
                hop.cut_off = True
                self._fail(as_error(hop.plan.peer, message))
            case Failed() if message.step is None or message.step in self._in_flight:
                error = as_error(hop.plan.peer, message)
                if isinstance(error, PeerError):
                    self._lose(hop, error)
                else:
                    self._fail(error)
            case Failed():
                log.debug("session %s: a stale failure: %s", self._id, message.message)
            case _:
                self._lose(hop, PeerFaultError(hop.plan.peer, f"sent {type(message).__name__}"))

    async def _pass_on(self, hop: HopLink, result: Result, flight: _InFlight) -> None:
        """Relay a hop's rows to the next hop - unless the replay ends here, which makes them an answer."""
        following = self._hops.index(hop) + 1
        left = max(flight.replay - max(following - flight.first, 0), 0)
        if flight.replay and not left:
            flight.answer.set_result(result.hidden)
            return
        step = Step(step=result.step, position=flight.position, keep=flight.keep, hidden=result.hidden, replay=left)
        await self._send(self._hops[following], step)

    async def _send(self, hop: HopLink, message: AnyMessage) -> None:
        try:
            await hop.send(message)
        except PeerError as error:
            self._lose(hop, error)
            raise

    def _lose(self, hop: HopLink, error: PeerError) -> None:
        """A hop can no longer be used. Whatever is in the air fails, so that the route is mended."""
        if hop.lost is not None or hop not in self._hops:
            return
        hop.lost = error
        self._router.lost(hop.plan.peer, error)
        self._fail(error)

    def _fail(self, error: LLMasOSError) -> None:
        for flight in self._in_flight.values():
            if not flight.answer.done():
                flight.answer.set_exception(error)

    async def _probe(self, hops: list[HopLink]) -> None:
        """Ping hops; those that do not answer in time are lost."""

        async def probe(hop: HopLink) -> None:
            try:
                await hop.ping()
            except PeerError as error:
                self._lose(hop, error)

        await asyncio.gather(*(probe(hop) for hop in hops if hop.lost is None))

    async def _keep_alive(self) -> None:
        """Renew the leases. Who does not answer is found by the next step."""
        while True:
            await asyncio.sleep(PING_EVERY_S)
            for hop in [hop for hop in self._hops if hop.ticket is not None and hop.lost is None]:
                try:
                    await hop.send_ping()
                except PeerError as error:
                    self._lose(hop, error)

    async def _leave(self, hop: HopLink) -> None:
        if hop.ticket is not None:
            self._router.closed(hop.ticket, well=hop.lost is None)
        await hop.hang_up()
