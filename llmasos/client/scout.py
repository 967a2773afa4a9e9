"""Asks peers how far and how busy they are, just before a session goes there.

Records are seconds old, and no client sees what the others are about to do. So a few routes are drawn, the peers on
them are asked, and the cheapest route through those that answer is taken. Two choices with fresh loads are what keeps a
crowd from gathering by chance (the busiest of ten peers has a fifth more than its share, and not a half); and a peer
that hangs, or is farther than it seemed, costs a session nothing.

All draws but the first are hopeful: whoever has never been measured is taken to be as near as the nearest, and who was
far is hoped to be nearer as time goes on. That is how the near ones are found in a world of which a client knows
little, and found again after an answer that was late by chance.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from random import Random

from llmasos.errors import ConnectionLostError, MissingBlocksError
from llmasos.network import Network
from llmasos.routing.cost import Load
from llmasos.routing.health import Health
from llmasos.routing.market import SPREAD
from llmasos.routing.planner import Hop, Route, draw, plan
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import SwarmView
from llmasos.span import Span
from llmasos.tasks import TaskSet
from llmasos.wire import PROTOCOL, Contact, FrameError, Ping, Pong, decode, encode

log = logging.getLogger(__name__)

DRAWS = 2
"""Routes to choose among: with two the gap between the busiest and the mean is a constant, more hardly narrow it."""
FIRST_DRAWS = 8
"""The same while a route leads through peers that were never measured: of the first peers of each span that are asked
one is likely near, even where most are not."""
FRESH_S = 0.5
"""So long an answer holds: a gateway that opens many sessions at once need not ask for each."""
LOOK_S = 0.5
"""The longest that a session waits for answers: twice the round trip to the other side of the world."""
GRACE = 0.5
"""When all peers of some route have answered, the others have so much of that time again: who needs more is far."""
SILENT_S = 2.0
"""Who has not answered by then has failed; as patient as a session is with the hops that it has."""


class Scout:
    """Chooses the routes of one client."""

    def __init__(self, network: Network, health: Health, rng: Random) -> None:
        self._network = network
        self._health = health
        self._rng = rng
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskSet()

    async def close(self) -> None:
        """Ask no more."""
        await self._tasks.close()

    async def route(self, view: SwarmView, request: RouteRequest) -> Route:
        """The cheapest of a few routes, by what their peers say now. Raises MissingBlocksError when there is none."""
        # 1. Draw.
        routes = self._draw(view, request, [False] + [True] * (FIRST_DRAWS - 1))
        drawn = list(islice(routes, DRAWS))
        if not all(self._health.measured(peer) for peer in drawn[0].peers):
            drawn += routes
        hops = {hop.peer: hop for route in drawn for hop in route.hops}
        if len(hops) == len(set(drawn[0].peers)):
            return drawn[0]  # there is nothing to choose
        # 2. Ask.
        waiting = self._ask_all(list(hops.values()))
        await self._wait(drawn, waiting)
        # 3. Choose among those that have answered.
        silent = frozenset(peer for peer in hops if not self._answered(peer, waiting))
        answered = tuple(peer for peer in hops if peer not in silent)
        if answered:
            try:
                return self._plan(view, replace(request, pin=answered), spread=0.0)
            except MissingBlocksError:
                log.debug("no route through those that answer: %d of %d", len(answered), len(hops))
        try:
            return self._plan(view, replace(request, exclude=request.exclude | silent))
        except MissingBlocksError:
            return drawn[0]

    async def revive(self, view: SwarmView, request: RouteRequest, missing: Sequence[Span]) -> bool:
        """Ask those that are left alone for a failure and have some of the blocks `missing`; True when one is back.

        How long a peer is left alone is a guess of how long it is away; where there is no other, that is found out.
        """
        now = self._network.now()
        away = [
            Hop(record.peer, record.span, record.addresses)
            for record in view.peers(request.model)
            if record.peer not in request.exclude
            and self._health.may_be_back(record.peer, now)
            and any(record.span.start < span.end and span.start < record.span.end for span in missing)
        ]
        waiting = self._ask_all(away)
        if waiting:
            await asyncio.wait(waiting.values(), timeout=LOOK_S)
        back = [hop.peer for hop in away if self._health.heard_of(hop.peer, since=now - FRESH_S)]
        for peer in back:
            self._health.returned(peer, self._network.now())
        return bool(back)

    def _draw(self, view: SwarmView, request: RouteRequest, hopeful: Sequence[bool]) -> Iterator[Route]:
        draws = [(hope, SPREAD) for hope in hopeful]
        return draw(view, request, self._network.now(), self._rng, self._health, draws)

    def _plan(self, view: SwarmView, request: RouteRequest, *, spread: float = SPREAD) -> Route:
        return plan(view, request, self._network.now(), self._rng, self._health, spread=spread)

    def _ask_all(self, hops: Sequence[Hop]) -> dict[str, asyncio.Task[None]]:
        """Ask each peer that has not answered a moment ago; the tasks of those that are being asked."""
        fresh_at = self._network.now() - FRESH_S
        for hop in hops:
            if hop.peer not in self._asking and not self._health.heard_of(hop.peer, since=fresh_at):
                self._asking[hop.peer] = self._tasks.spawn(self._ask(hop), f"a look at {hop.peer}")
        return {hop.peer: self._asking[hop.peer] for hop in hops if hop.peer in self._asking}

    async def _wait(self, drawn: Sequence[Route], waiting: dict[str, asyncio.Task[None]]) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        deadline = begin + LOOK_S
        while pending := [task for task in waiting.values() if not task.done()]:
            if any(all(self._answered(peer, waiting) for peer in route.peers) for route in drawn):
                deadline = min(deadline, loop.time() + GRACE * (loop.time() - begin))
            if loop.time() >= deadline:
                return
            await asyncio.wait(pending, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)

    def _answered(self, peer: str, waiting: dict[str, asyncio.Task[None]]) -> bool:
        task = waiting.get(peer)
        return (task is None or task.done()) and not self._health.avoided_for(peer, self._network.now())

    async def _ask(self, hop: Hop) -> None:
        loop, peer = asyncio.get_running_loop(), hop.peer
        try:
            async with asyncio.timeout(SILENT_S):
                stream = await self._network.connect(Contact(peer, hop.addresses), PROTOCOL)
                try:
                    asked_at = loop.time()
                    await stream.send(encode(Ping()))
                    answer = decode(await stream.receive())
                    rtt_s = loop.time() - asked_at
                finally:
                    await stream.close()
        except (ConnectionLostError, FrameError, TimeoutError) as error:
            log.debug("peer %s does not answer: %s", peer, error)
            self._health.failed(peer, self._network.now())
            return
        finally:
            del self._asking[peer]
        if isinstance(answer, Pong):
            self._health.saw_rtt(peer, rtt_s, self._network.now())
            if answer.sessions is not None and answer.kv_free_tokens is not None:
                load = Load(answer.sessions, answer.queued, answer.kv_free_tokens, self._network.now())
                self._health.saw_load(peer, load)
