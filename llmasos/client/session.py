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
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from llmasos.client.blame import Blame
from llmasos.client.connections import Connections
from llmasos.client.events import Event, HandedOver, OnEvent, Rerouted, Waiting, ignore
from llmasos.client.flights import Flight, Flights
from llmasos.client.hop import HopLink
from llmasos.client.hops import Hops
from llmasos.client.recruiter import Recruiter
from llmasos.client.router import Router
from llmasos.client.trace import Tracer
from llmasos.codec import pack
from llmasos.config import MAX_ROWS_IN_FLIGHT, ClientConfig
from llmasos.errors import (
    ConnectionLostError,
    MissingBlocksError,
    PeerError,
    PeerFaultError,
    PeerTimeoutError,
    UsageError,
)
from llmasos.history import History
from llmasos.logs import session_label
from llmasos.network import Network
from llmasos.routing.planner import Route, RouteRequest
from llmasos.span import Span
from llmasos.wire import AnyMessage, Draining, Failed, Replay, Result, Step, Tensor, Trail, join_rows

log = logging.getLogger(__name__)


class Session:
    """An open chain of hops. An async context manager; one `forward` at a time.

    `request.kv_tokens` is what each hop reserves for the session.
    """

    def __init__(
        self,
        network: Network,
        router: Router,
        request: RouteRequest,
        config: ClientConfig,
        *,
        on_event: OnEvent = ignore,
        trace: bool = False,
        prefix: Sequence[bytes] = (),
        sound: Callable[[Tensor], bool] = lambda rows: True,
    ) -> None:
        """`prefix` names the first pages of what will be sent: see `prefix_tokens`. For `sound` see `Blame`."""
        if request.model_blocks is None:
            raise ValueError("a session must know how many blocks its model has")
        self.failovers = 0
        self.replayed_tokens = 0
        self.replay_s = 0.0
        self.waiting: Waiting | None = None
        """What the session waits for, while it does."""
        self.tracer = Tracer(router.round_trip_s, network.now) if trace else None
        self._on_event = on_event
        self._router = router
        self._request = request
        self._config = config
        name = router.new_session_id()
        self.label = session_label(name)
        self._hops = Hops(request.model_blocks)
        self._inputs = History()
        self._answered = 0  # positions below this are answered, and cached on every hop that is not lagging
        self._flights = Flights(network.now)
        self._spent: Trail = ()  # what each hop says that it spent on the latest step
        self._steps = itertools.count()
        self._blame = Blame(self._hops, self._flights, sound)
        self._connections = Connections(network, router, config, self.label, self._hear, self._on_lost)
        self._recruiter = Recruiter(name, config, self._hops, router, self._connections, prefix=prefix)

    @property
    def prefix_tokens(self) -> int:
        """How many positions every hop held when the session was opened on it. None counts once a row was sent."""
        return min((hop.prefix_tokens for hop in self._hops), default=0) if self._inputs.length == 0 else 0

    def begin_with(self, rows: Tensor) -> None:
        """Go on behind the first positions of those `prefix_tokens`: `rows` are what would have been sent for them."""
        if self._inputs.length or rows.tokens > self.prefix_tokens:
            raise UsageError(f"{rows.tokens} positions are not held by every hop")
        self._inputs.write(0, rows)
        self._answered = rows.tokens

    @property
    def length(self) -> int:
        """How many positions have been answered."""
        return self._answered

    @property
    def route(self) -> Route:
        """The hops that serve the session now."""
        return self._hops.route

    async def __aenter__(self) -> Self:
        """Build a route and open a session on each of its hops. Raises MissingBlocksError when there is none."""
        self._connections.start(lambda: self._hops.everybody)
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
        for hop in self._hops.clear():
            self._connections.leave(hop)
        self._flights.forget()
        await self._connections.close()

    async def forward(self, rows: Tensor, *, position: int | None = None, keep: int = 1) -> Tensor:
        """Send `rows`, (tokens, hidden), through all blocks; returns the last `keep` of what comes out.

        They take the positions from `position` on (by default behind the last): a lower one rolls the session back.
        Raises MissingBlocksError when a lost hop cannot be replaced, UsageError when two peers or all refuse the rows.
        """
        start = self._answered if position is None else position
        if not 0 <= start <= self._answered:
            raise UsageError(f"position {start} leaves a hole: the session holds {self._answered} positions")
        if rows.tokens == 0:
            return rows
        self._inputs.write(start, rows)
        self._answered = start
        self._blame.begin(rows)
        kept: list[Tensor] = []
        await self._until_it_works(lambda: self._advance(keep, kept))
        return join_rows(kept) if kept else rows.rows(0, 0)

    # --- steps -------------------------------------------------------------------------------------------------------

    async def _advance(self, keep: int, kept: list[Tensor]) -> None:
        """Send all that is not answered, several chunks ahead so that all hops have work; take answers in order."""
        await self._mend()
        loop = asyncio.get_running_loop()
        begin, start, end = loop.time(), self._answered, self._inputs.length

        def landed(position: int, answer: Tensor) -> None:
            if answer.tokens:
                kept.append(answer)
            self._answered = position

        def wanted(behind: int, tokens: int) -> int:
            return min(max(behind - (end - keep), 0), tokens)

        await self._send_rows(start, end, wanted, landed)
        if end - start == 1:
            self._router.saw_step([hop.plan for hop in self._hops], loop.time() - begin, self._spent)

    async def _send_rows(
        self,
        start: int,
        end: int,
        keep: Callable[[int, int], int],
        landed: Callable[[int, Tensor], None],
        replay: int = 0,
    ) -> None:
        """Send the rows `[start, end)` in chunks, a bounded number of rows ahead of their answers.

        `keep(behind, tokens)` says how many rows of a chunk that ends at `behind` are wanted back; `landed` takes the
        position behind each chunk that is answered, and its answer.
        """
        ahead: deque[tuple[int, int]] = deque()  # number of the step, and the position behind it
        done = start
        for position, rows in self._inputs.chunks(start, end, self._config.prompt_chunk_tokens):
            behind = position + rows.tokens
            while ahead and behind - done > MAX_ROWS_IN_FLIGHT:
                number, done = ahead.popleft()
                landed(done, await self._answer(number))
            number = next(self._steps)
            kept = keep(behind, rows.tokens)
            self._flights.start(number, position, kept, 0, replay, rows.tokens)
            packed = pack(rows, self._recruiter.packing.codec(0))
            await self._connections.send(
                self._hops[0], Step(step=number, position=position, keep=kept, hidden=packed, replay=replay)
            )
            ahead.append((number, behind))
        for number, behind in ahead:
            landed(behind, await self._answer(number))

    async def _answer(self, number: int) -> Tensor:
        """Wait for a step. When it is late, look for hops that are silent; those that answer are waited for longer."""
        loop = asyncio.get_running_loop()
        begin, probed = loop.time(), False
        deadline = begin + self._config.step_timeout_s
        most_s = self._config.suspect_after_s
        while (found := await self._flights.answer(number, self._flights.patience_s(most_s))) is None:
            probed = True
            await self._connections.probe(list(self._hops))
            for hop in self._hops.cut_links(number, loop.time()):
                self._cut_off(hop, "its rows do not arrive")
            if loop.time() > deadline:
                for hop in self._hops:  # all answer pings, yet the step is gone: trust none of them with it again
                    self._connections.lose(
                        hop, PeerTimeoutError(hop.plan.peer, f"no step in {self._config.step_timeout_s:g} s")
                    )
        if not probed:
            self._flights.took(loop.time() - begin)
        return found

    # --- failover ----------------------------------------------------------------------------------------------------

    async def _until_it_works(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """An attempt ends with the first peer that fails; the next one begins by mending the route."""
        for left in reversed(range(self._config.max_failovers)):
            try:
                return await attempt()
            except PeerError as error:
                log.info("session %s: %s", self.label, error.message)
                if left == 0:
                    raise
            finally:
                self._flights.forget()
        return None

    async def _mend(self) -> None:
        """Make every hop live: relay past broken links, replace what is lost, let newcomers catch up, move away from
        peers that drain. One thing at a time, until there is nothing left to do.
        """
        while not self._hops.settled:
            for hop in self._hops.undo_hand_overs():
                self._connections.leave(hop)
            cut_off = next((hop for hop in self._hops if hop.cut_off), None)
            if cut_off is not None:
                await self._bridge(cut_off)
            elif missing := self._hops.missing():
                await self._replace(missing)
            elif misinformed := self._hops.misinformed():
                await self._inform(misinformed)
            elif lagging := self._hops.lagging():
                await self._catch_up(*lagging)
            elif draining := self._to_hand_over():
                await self._recruiter.relieve(self._request, draining, new=self._inputs.length == 0)
            else:
                for hop in self._hops.end_hand_overs():
                    self._connections.leave(hop)
                    self._on_event(HandedOver(hop.plan.peer))
                return

    async def _bridge(self, hop: HopLink) -> None:
        """A hop cannot reach the next one. If we can, we relay; if we cannot either, that one is lost."""
        hop.cut_off = False
        following = self._hops.after(hop)
        if hop.lost is not None:
            return
        if following is None or hop.relay:
            self._connections.lose(hop, PeerFaultError(hop.plan.peer, "has lost a next hop that it does not have"))
            return
        await self._connections.probe([following])
        if following.lost is None:
            log.info("session %s: relaying from block %d on", self.label, hop.plan.span.end)
            hop.relay = True

    async def _replace(self, missing: list[Span]) -> None:
        """Put new hops where blocks are missing, and open them."""
        lost = self._hops.drop_lost()
        if any(hop.told is not None for hop in lost):  # who would not take us in was never ours to lose
            self.failovers += 1
        for hop in lost:
            self._connections.leave(hop)
        try:
            await self._recruiter.fill(
                self._blame.asked_of_others(self._request),
                missing,
                new=self._inputs.length == 0,
                patient=self._answered > 0 and self._blame.error is None,
                on_event=self._tell_of_waiting,
            )
        except MissingBlocksError as error:
            raise (self._blame.error or error) from None
        finally:
            self.waiting = None
        if lost:
            reasons = "; ".join(hop.lost.message for hop in lost if hop.lost is not None)
            self._on_event(Rerouted(tuple(hop.plan.peer for hop in lost), reasons))

    def _tell_of_waiting(self, event: Event) -> None:
        if isinstance(event, Waiting):
            self.waiting = event
        self._on_event(event)

    def _to_hand_over(self) -> HopLink | None:
        """A hop that drains, unless nobody could take over from it a moment ago."""
        now = asyncio.get_running_loop().time()
        return next((hop for hop in self._hops if hop.draining and hop.stays_until <= now), None)

    async def _inform(self, hops: list[HopLink]) -> None:
        """Tell hops who their neighbours are, and wait until they have heard it: steps must not overtake that."""
        for hop in hops:
            sides = self._hops.sides(hop)
            await self._connections.send(hop, sides)
            hop.told = sides
        await self._connections.probe(hops)
        for hop in hops:
            if hop.lost is not None:
                raise hop.lost

    async def _catch_up(self, first: int, count: int) -> None:
        """Let the hops `[first, first + count)` compute what has been answered, from what the hop before them sent."""
        until, chunk = self._answered, self._config.prompt_chunk_tokens
        begin = asyncio.get_running_loop().time()
        catching_up = [self._hops[index] for index in range(first, first + count)]
        if until and first == 0:
            await self._send_rows(0, until, lambda behind, tokens: 0, lambda behind, answer: None, replay=count)
        elif until:
            numbers = [next(self._steps) for _ in range(0, until, chunk)]
            for index, number in enumerate(numbers):
                self._flights.start(number, index * chunk, 0, first, count)
            await self._connections.send(
                self._hops[first - 1], Replay(step=numbers[0], until=until, chunk=chunk, hops=count)
            )
            for number in numbers:
                await self._answer(number)
        self.replayed_tokens += until
        self.replay_s += asyncio.get_running_loop().time() - begin
        for hop in catching_up:
            hop.lagging = False

    # --- what the hops say -------------------------------------------------------------------------------------------

    def _hear(self, hop: HopLink, message: AnyMessage) -> None:
        match message:
            case Result():
                flight = self._flights.waiting(message.step)
                if flight is None or hop not in self._hops:
                    return  # of a step that has been sent anew since
                self._take(hop, message, flight)
            case Draining():
                log.info("session %s: %s drains", self.label, hop.plan.peer)
                hop.draining = True
            case Failed(code="next_hop_lost") if message.step in self._flights:
                self._cut_off(hop, message.message)
            case Failed() if message.step is None or message.step in self._flights:
                verdict = self._blame.verdict(hop, message)
                if isinstance(verdict, UsageError):
                    self._flights.fail(verdict)
                    return
                for suspect, error in verdict.items():
                    self._connections.lose(suspect, error)
            case Failed():
                log.debug("session %s: a stale failure: %s", self.label, message.message)
            case _:
                self._connections.lose(hop, PeerFaultError(hop.plan.peer, f"sent {type(message).__name__}"))

    def _take(self, hop: HopLink, result: Result, flight: Flight) -> None:
        """Rows from a hop: an answer if they come from where the step ends, or to be relayed to the next hop."""
        following = self._hops.index(hop) + 1
        ends_at = flight.first + flight.replay if flight.replay else len(self._hops)
        if following == ends_at:
            if flaw := self._blame.flaw(hop, result.hidden, flight):
                self._connections.lose(hop, PeerFaultError(hop.plan.peer, f"answered {flaw}"))
            else:
                if self.tracer is not None and not flight.replay:
                    self.tracer.took(flight, result, self.route.hops)
                self._spent = result.spent
                flight.answer.set_result(result.hidden)
        elif hop.relay and following < ends_at:
            left = max(ends_at - following, 0) if flight.replay else 0
            self._connections.relay(self._hops[following], flight.onward(result, left))
        else:
            self._connections.lose(hop, PeerFaultError(hop.plan.peer, "answered in the place of another hop"))

    def _cut_off(self, hop: HopLink, why: str) -> None:
        """A hop is well, but does not reach the next one."""
        hop.cut_off = True
        self._flights.fail(ConnectionLostError(hop.plan.peer, why))

    def _on_lost(self, hop: HopLink, error: PeerError) -> None:
        """Whatever is in the air fails, so that the route is mended; a hop that we have left is no loss."""
        if hop in self._hops:
            self._router.lost(hop.plan.peer, error)
            self._flights.fail(error)
