"""Where the client's sessions get their routes: the planner, fed with a fresh view and what this client has seen."""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from llmasos.client.events import OnEvent, Waiting, ignore
from llmasos.client.scout import Scout
from llmasos.config import ClientConfig
from llmasos.errors import LLMasOSError, MissingBlocksError, PeerRefusedError
from llmasos.network import Network
from llmasos.routing.directory import Directory
from llmasos.routing.health import Health
from llmasos.routing.planner import Hop, Route, RouteRequest
from llmasos.routing.tickets import Ticket
from llmasos.routing.view import SwarmView
from llmasos.span import Span
from llmasos.wire import Trail

log = logging.getLogger(__name__)

RETRY_EVERY_S = 1.0
"""How often the registry is asked for blocks that are missing: a new peer is announced within milliseconds."""

MAX_SHORT_WAIT_S = 2.0
"""A peer that failed once is avoided for a second; when only it has the blocks, that is waited for."""


Policy = Callable[[SwarmView, RouteRequest, float, random.Random, Health], Route]
"""Another way to choose routes; the simulator compares ours with some."""


class Router:
    """Plans for all sessions of one process, so that they spread and learn from each other's failures."""

    def __init__(
        self,
        network: Network,
        directory: Directory,
        config: ClientConfig,
        rng: random.Random,
        *,
        policy: Policy | None = None,
    ) -> None:
        """`policy` chooses the routes in the place of our planner and scout."""
        self.directory = directory
        self.health = Health()
        self._network = network
        self._config = config
        self._rng = rng
        self._policy = policy
        self._scout = Scout(network, self.health, rng)

    async def close(self) -> None:
        """End what runs in the background."""
        await self._scout.close()

    def new_session_id(self) -> str:
        """A name that nobody can guess: who knows it may be taken for the session's previous hop."""
        return f"{self._rng.getrandbits(128):032x}"

    async def plan(
        self,
        request: RouteRequest,
        missing: Sequence[Span],
        *,
        patient_since: float | None = None,
        on_event: OnEvent = ignore,
    ) -> list[Hop]:
        """The cheapest hops for the blocks `missing`, in order.

        Raises MissingBlocksError when no peer has them, after looking again - until they have been missing for
        `wait_for_blocks_s`, if `patient_since` (loop time) says since when; `on_event` is told of the waiting.
        """
        loop = asyncio.get_running_loop()
        begin = loop.time() if patient_since is None else patient_since
        deadline = begin if patient_since is None else begin + self._config.wait_for_blocks_s
        max_age_s = self._config.refresh_every_s
        while True:
            await self.directory.refresh(request.model, max_age_s=max_age_s)
            try:
                return [hop for span in missing for hop in (await self._choose(request, span)).hops]
            except MissingBlocksError as error:
                if max_age_s > 0:
                    max_age_s = 0.0  # the view may be stale: look again before giving up
                    continue
                if await self._scout.revive(self.directory.view, request, _spans(error)):
                    continue
                avoided_s = self._shortest_avoidance_s(request.model)
                now = loop.time()
                if now >= deadline and not 0 < avoided_s <= begin + MAX_SHORT_WAIT_S - now:
                    raise error.wanting(request.dtype, request.quantization) from None
                on_event(Waiting(request.model, tuple(error.missing), now - begin, max(deadline - now, 0.0)))
                log.debug("%s; waiting for a peer that serves them", error.message)
                await asyncio.sleep(min(avoided_s, RETRY_EVERY_S) if avoided_s else RETRY_EVERY_S)

    def saw_rtt(self, peer: str, seconds: float) -> None:
        """A ping came back."""
        self.health.saw_rtt(peer, seconds, self._network.now())

    def round_trip_s(self, peer: str) -> float:
        """To a peer and back, as measured; what is usual for one that has not been."""
        return self.health.rtt_s(peer)

    def saw_step(self, hops: Sequence[Hop], seconds: float, spent: Trail = ()) -> None:
        """One row went through all hops and came back; `spent` is what they say that it took there, if they do.

        The links between them are not measured. They can make up for no more than a way through us would: what is
        longer than that and what the hops admit, somebody hides, and all of them are charged. Of hops that say nothing
        only the sum is known, of which a link between two has the mean of ours.
        """
        now = self._network.now()
        rtts = [self.health.rtt_s(hop.peer) for hop in hops]
        if not spent or len(spent) != len(hops):
            links_s = (rtts[0] + rtts[-1]) / 2 + (len(hops) - 1) * fmean(rtts) / 2
            route = [(hop.peer, len(hop.span)) for hop in hops]
            self.health.saw_route(route, max(seconds - links_s, 0.0), now)
            return
        admitted = [min((queue_us + compute_us) / 1e6, seconds) for queue_us, compute_us in spent]
        hidden_s = max(seconds - sum(rtts) - sum(admitted), 0.0) / sum(len(hop.span) for hop in hops)
        for hop, admitted_s in zip(hops, admitted, strict=True):
            self.health.saw_step(hop.peer, len(hop.span), admitted_s + hidden_s * len(hop.span), now)

    def opened(self, peer: str, session: str, tokens: int) -> Ticket:
        """A session begins on a peer; its record cannot show it yet."""
        return self.health.opened(peer, session, tokens, self._network.now())

    def closed(self, ticket: Ticket, *, well: bool) -> None:
        """A session on a peer is over."""
        self.health.closed(ticket, self._network.now())
        if well:
            self.health.succeeded(ticket.peer)

    def lost(self, peer: str, error: LLMasOSError) -> None:
        """A peer failed a session, or would not take it."""
        if isinstance(error, PeerRefusedError):
            self.health.refused(peer, error.retry_after_s, self._network.now())
        else:
            self.health.lost(peer, self._network.now())

    def _shortest_avoidance_s(self, model: str) -> float:
        """Until the first peer that has failed us may be tried again; zero when we avoid none."""
        now = self._network.now()
        waits = (self.health.avoided_for(record.peer, now) for record in self.directory.view.peers(model))
        return min((wait for wait in waits if wait > 0), default=0.0)

    async def _choose(self, request: RouteRequest, span: Span) -> Route:
        part = replace(request, start=span.start, end=span.end)
        if self._policy is None:
            return await self._scout.route(self.directory.view, part)
        return self._policy(self.directory.view, part, self._network.now(), self._rng, self.health)


def _spans(error: MissingBlocksError) -> list[Span]:
    """What is missing; nothing of a model of which nobody says how many blocks it has."""
    return [Span.parse(gap) for gap in error.missing if gap != "auto"]
