"""Where the client's sessions get their routes: the planner, fed with a fresh view and what this client has seen."""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import replace

from llmasos.config import ClientConfig
from llmasos.errors import LLMasOSError, MissingBlocksError, PeerRefusedError
from llmasos.network import Network
from llmasos.routing.directory import Directory
from llmasos.routing.health import Health, Ticket
from llmasos.routing.planner import Hop, Route, RouteRequest, plan
from llmasos.span import Span

log = logging.getLogger(__name__)

RETRY_EVERY_S = 1.0
"""How often the registry is asked for blocks that are missing: a new peer is announced within milliseconds."""


class Router:
    """Plans for all sessions of one process, so that they spread and learn from each other's failures."""

    def __init__(self, network: Network, directory: Directory, config: ClientConfig, rng: random.Random) -> None:
        self.directory = directory
        self.health = Health()
        self._network = network
        self._config = config
        self._rng = rng

    def new_session_id(self) -> str:
        """A name that nobody can guess: who knows it may be taken for the session's previous hop."""
        return f"{self._rng.getrandbits(128):032x}"

    async def plan(self, request: RouteRequest, missing: Sequence[Span], *, patient: bool) -> list[Hop]:
        """The cheapest hops for the blocks `missing`, in order.

        Raises MissingBlocksError when no peer has them, after looking again - for `wait_for_blocks_s` if `patient`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._config.wait_for_blocks_s if patient else 0.0)
        max_age_s = self._config.refresh_every_s
        while True:
            await self.directory.refresh(request.model, max_age_s=max_age_s)
            try:
                return [hop for span in missing for hop in self._plan(request, span).hops]
            except MissingBlocksError as error:
                if max_age_s > 0:
                    max_age_s = 0.0  # the view may be stale: look again before giving up
                    continue
                if loop.time() >= deadline:
                    raise
                log.warning("%s; waiting for a peer that serves them", error.message)
                await asyncio.sleep(RETRY_EVERY_S)

    def opened(self, peer: str, tokens: int) -> Ticket:
        """A session begins on a peer; its record cannot show it yet."""
        return self.health.opened(peer, tokens, self._network.now())

    def closed(self, ticket: Ticket, *, well: bool) -> None:
        """A session on a peer is over."""
        self.health.closed(ticket)
        if well:
            self.health.succeeded(ticket.peer)

    def lost(self, peer: str, error: LLMasOSError) -> None:
        """A peer failed a session, or would not take it."""
        if isinstance(error, PeerRefusedError):
            self.health.refused(peer, error.retry_after_s, self._network.now())
        else:
            self.health.failed(peer, self._network.now())

    def _plan(self, request: RouteRequest, span: Span) -> Route:
        part = replace(request, start=span.start, end=span.end)
        return plan(self.directory.view, part, self._network.now(), self._rng, self.health)
