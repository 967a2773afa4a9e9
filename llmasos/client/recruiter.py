"""Finds peers for the blocks that a session lacks, and opens the session on them."""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

from llmasos.client.connections import Connections
from llmasos.client.events import OnEvent
from llmasos.client.hop import HopLink
from llmasos.client.hops import Hops
from llmasos.client.packing import Packing
from llmasos.client.router import Router
from llmasos.config import HAND_OVER_RETRY_S, ClientConfig
from llmasos.errors import PeerRefusedError, SwarmError
from llmasos.routing.planner import Hop, RouteRequest
from llmasos.span import Span
from llmasos.wire import Open

log = logging.getLogger(__name__)


class Recruiter:
    """Puts newcomers among the `hops` of the session `name`, whose prompt begins with the pages `prefix`."""

    def __init__(
        self,
        name: str,
        config: ClientConfig,
        hops: Hops,
        router: Router,
        connections: Connections,
        *,
        prefix: Sequence[bytes] = (),
    ) -> None:
        self._name = name
        self._config = config
        self._hops = hops
        self.packing = Packing(config.codec)
        self._router = router
        self._connections = connections
        self._prefix = tuple(prefix)
        self._names = itertools.count()
        self._newest: list[HopLink] = []
        self._repairing_since = 0.0  # loop time

    async def fill(
        self, request: RouteRequest, missing: list[Span], *, new: bool, patient: bool, on_event: OnEvent
    ) -> None:
        """Put hops where blocks are missing, and open them. `new` is a session that holds no rows yet; its blocks may
        be missing still. If `patient`, they are waited for, once for all attempts until newcomers have caught up.

        Raises MissingBlocksError when there are none, and what the first of them was lost by that does not open.
        """
        if new and self.packing.wanted:  # what each hop is told depends on all of them
            self._leave_all()
            missing = self._hops.missing()
        planned = await self._router.plan(
            request if new else self._of_those_able(request),
            self.packing.split(missing),
            patient_since=self._patient_since() if patient else None,
            on_event=on_event,
        )
        newcomers = self._newest = self._newcomers(planned)
        self._hops.insert(newcomers)
        if new:
            self.packing.choose([hop.plan for hop in self._hops])
        unable = await self._open(request, newcomers, new=new)
        if unable and new:
            self._leave_all()  # the next route packs nothing beside them
            return
        self._lose(unable)
        errors = [hop.lost for hop in newcomers if hop.lost is not None]
        if errors:
            raise errors[0]

    async def relieve(self, request: RouteRequest, old: HopLink, *, new: bool) -> None:
        """Put others in the place of a hop that drains, if there are any; it waits aside until they have caught up."""
        old.stays_until = asyncio.get_running_loop().time() + HAND_OVER_RETRY_S
        going = {hop.plan.peer for hop in self._hops if hop.draining}
        request = self._of_those_able(replace(request, exclude=request.exclude | going))
        try:
            planned = await self._router.plan(request, [old.plan.span])
        except SwarmError as error:
            log.info("a session stays on %s until it goes: %s", old.plan.peer, error.message)
            return
        if old not in self._hops or old.lost is not None:
            return
        newcomers = self._newcomers(planned)
        self._hops.begin_hand_over(old, newcomers)
        self._lose(await self._open(request, newcomers, new=new))

    def _patient_since(self) -> float:
        """Since when this repair goes on: newcomers that were lost before they were of use did not end it."""
        if not any(hop.lagging for hop in self._newest):
            self._repairing_since = asyncio.get_running_loop().time()
        self._newest = []  # who gives up now, and comes back, begins another one
        return self._repairing_since

    def _leave_all(self) -> None:
        for hop in self._hops.clear():
            self._connections.leave(hop)

    def _of_those_able(self, request: RouteRequest) -> RouteRequest:
        """The same, of peers that may know how our rows are packed."""
        return replace(request, exclude=request.exclude | self.packing.unable)

    def _newcomers(self, planned: list[Hop]) -> list[HopLink]:
        return [HopLink(plan, f"{self._name}.{next(self._names)}") for plan in planned]

    async def _open(self, request: RouteRequest, newcomers: list[HopLink], *, new: bool) -> list[HopLink]:
        """Open the session on new hops, all at once; whoever fails is lost.

        Returns those that cannot read or write what they would have to.
        """
        await asyncio.gather(*(self._connections.open(hop, self._opening(request, hop, new)) for hop in newcomers))
        return [hop for hop in newcomers if hop.lost is None and not self.packing.suits(hop.plan, hop.codecs)]

    def _lose(self, unable: list[HopLink]) -> None:
        for hop in unable:
            self._connections.lose(hop, PeerRefusedError(hop.plan.peer, f"does not know {self._config.codec} rows"))

    def _opening(self, request: RouteRequest, hop: HopLink, new: bool) -> Open:
        sides = self._hops.sides(hop)
        return Open(
            session=hop.session,
            digest=request.digest,
            dtype=self._config.dtype,
            start=hop.plan.span.start,
            end=hop.plan.span.end,
            tokens=request.kv_tokens,
            upstream=sides.upstream,
            downstream=sides.downstream,
            prefix=self.packing.names(self._prefix) if new else (),
            codec=self.packing.codec(hop.plan.span.end),
            trace=True,  # the router learns from it which hops are slow
        )
