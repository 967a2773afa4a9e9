"""The streams of one session to its hops: opened, listened to, kept alive, given up.

Whatever a peer does to us ends in `lose`, once, and the session is told. What is to be said to a hop on the way to
something else - goodbyes, rows that we relay - is said in the background: a peer that hangs holds nobody up.
"""

import asyncio
import logging
from collections.abc import Callable

from llmasos.client.hop import HopLink
from llmasos.client.router import Router
from llmasos.config import PING_EVERY_S, ClientConfig
from llmasos.errors import PeerError
from llmasos.network import Network
from llmasos.tasks import TaskSet
from llmasos.wire import AnyMessage, Open, Pong

log = logging.getLogger(__name__)


class Connections:
    """Speaks with the hops of one session. `hear` is given what they say, `lost` each hop that is no more; `session` is
    what the session is called on this machine.
    """

    def __init__(
        self,
        network: Network,
        router: Router,
        config: ClientConfig,
        session: str,
        hear: Callable[[HopLink, AnyMessage], None],
        lost: Callable[[HopLink, PeerError], None],
    ) -> None:
        self._network = network
        self._router = router
        self._config = config
        self._session = session
        self._hear = hear
        self._lost = lost
        self._relayed: asyncio.Queue[tuple[HopLink, AnyMessage]] = asyncio.Queue()
        self._tasks = TaskSet()
        self._farewells = TaskSet()

    def start(self, everybody: Callable[[], list[HopLink]]) -> None:
        """Begin to keep alive whomever `everybody()` names, and to relay."""
        self._tasks.spawn(self._keep_alive(everybody), f"pings of session {self._session}")
        self._tasks.spawn(self._relay(), f"relay of session {self._session}")

    async def close(self) -> None:
        """Say the goodbyes that are begun, and nothing else."""
        await self._tasks.close()
        await self._farewells.finish()

    async def open(self, hop: HopLink, request: Open) -> None:
        """Open the session on a new hop; it is lost at once when that fails."""
        try:
            await hop.open(self._network, request, self._config.open_timeout_s)
            await hop.send_ping()
        except PeerError as error:
            self.lose(hop, error)
        else:
            hop.ticket = self._router.opened(hop.plan.peer, self._session, request.tokens)
            self._tasks.spawn(self._listen(hop), f"answers of {hop.session}")

    async def send(self, hop: HopLink, message: AnyMessage) -> None:
        """Send a message. Raises the PeerError that the hop is lost by when that fails."""
        try:
            await hop.send(message)
        except PeerError as error:
            self.lose(hop, error)
            raise

    def relay(self, hop: HopLink, message: AnyMessage) -> None:
        """Send a message in the background, behind those that are to be relayed already."""
        self._relayed.put_nowait((hop, message))

    async def probe(self, hops: list[HopLink]) -> None:
        """Ping hops; those that do not answer in time are lost."""

        async def probe(hop: HopLink) -> None:
            try:
                await hop.ping()
            except PeerError as error:
                self.lose(hop, error)

        await asyncio.gather(*(probe(hop) for hop in hops if hop.lost is None))

    def lose(self, hop: HopLink, error: PeerError) -> None:
        """A hop can no longer be used."""
        if hop.lost is None:
            hop.lose(error)
            self._lost(hop, error)

    def leave(self, hop: HopLink) -> None:
        """A hop is no longer needed."""
        if hop.ticket is not None:
            self._router.closed(hop.ticket, well=hop.lost is None)
            hop.ticket = None
        self._farewells.spawn(hop.hang_up(), f"goodbye to {hop.session}")

    # --- in the background --------------------------------------------------------------------------------------------

    async def _listen(self, hop: HopLink) -> None:
        """Take a hop's messages until it is lost."""
        try:
            while True:
                message = await hop.receive()
                if isinstance(message, Pong):
                    rtt_s = hop.hear_pong(message)
                    if rtt_s is not None:
                        self._router.saw_rtt(hop.plan.peer, rtt_s)
                else:
                    self._hear(hop, message)
        except PeerError as error:
            self.lose(hop, error)

    async def _relay(self) -> None:
        while True:
            hop, message = await self._relayed.get()
            try:
                await self.send(hop, message)
            except PeerError as error:
                log.debug("not relayed: %s", error.message)

    async def _keep_alive(self, everybody: Callable[[], list[HopLink]]) -> None:
        """Renew the leases, all at once: one that hangs must not cost the others theirs."""

        async def renew(hop: HopLink) -> None:
            try:
                await hop.send_ping()
            except PeerError as error:
                self.lose(hop, error)

        while True:
            await asyncio.sleep(PING_EVERY_S)
            standing = [hop for hop in everybody() if hop.ticket is not None and hop.lost is None]
            await asyncio.gather(*(renew(hop) for hop in standing))
