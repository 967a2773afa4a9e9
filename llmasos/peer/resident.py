"""A peer process's life on one span after the other: load, serve, and move when the swarm needs it elsewhere.

The network and its identity stay; each span is a `Peer` of its own, and leaving it drains. Who is on the way - loading,
or moving - announces `joining` with the span where it will be found, so that others do not run to the same place.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Protocol

from llmasos import __version__
from llmasos.config import JITTER_S, LOOK_EVERY_S, LOOKS_PER_S, MIN_STAY_S, URGENT_JITTER_S, PeerConfig
from llmasos.errors import LLMasOSError
from llmasos.network import Network
from llmasos.peer.announce import Announcer
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.peer.runner import Runner, Speed
from llmasos.peer.watcher import Watcher
from llmasos.routing.directory import Directory
from llmasos.routing.placement import Move, better_span
from llmasos.routing.records import PeerRecord, PeerState
from llmasos.span import Span
from llmasos.tasks import TaskSet

log = logging.getLogger(__name__)


class Lookout:
    """Watches the swarm for a peer that may move, and says when that is worth it."""

    def __init__(self, directory: Directory, describe: Callable[[], PeerRecord], rng: Random) -> None:
        self._directory = directory
        self._describe = describe
        self._rng = rng

    async def wait_for_move(self) -> Move:
        """Return where to move, once it is certain. Whoever could move as well waits a while of its own, and looks
        again: the first to go announces it, and the others see that they are not needed.
        """
        loop = asyncio.get_running_loop()
        came_at = loop.time()
        while True:
            every_s = max(LOOK_EVERY_S, len(self._directory.view) / LOOKS_PER_S)
            await asyncio.sleep(every_s * self._rng.uniform(0.5, 1.5))
            move = await self._look()
            if move is None or not (move.urgent or loop.time() - came_at >= MIN_STAY_S):
                continue
            most_s = min(URGENT_JITTER_S, 0.5 * move.movers) if move.urgent else JITTER_S
            await asyncio.sleep(self._rng.uniform(0.0, most_s))
            again = await self._look()
            if again is not None and again.urgent >= move.urgent:
                return again

    async def _look(self) -> Move | None:
        record = self._describe()
        try:
            await self._directory.refresh(record.model)
        except LLMasOSError as error:  # what cannot be seen is no reason to move
            log.debug("cannot look at the swarm: %s", error.message)
            return None
        return better_span(self._directory.view, record, record.announced_at, self._rng)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Blocks that can be served, and room for the sessions that use them."""

    runner: Runner
    kv_tokens: int


class Host(Protocol):
    """What a process does for the peers that live in it."""

    async def load(self, span: Span) -> Loaded:
        """Bring the blocks into memory."""

    async def ready(self, peer: Peer) -> None:
        """The peer is online."""

    def leaving(self, going_to: Span | None) -> None:
        """It is about to leave its span: for another one, or for good."""


class Resident:
    """Serves one span after the other; `live()` returns when `stop` is set."""

    def __init__(
        self,
        network: Network,
        served: Served,
        config: PeerConfig,
        host: Host,
        directory: Directory,
        rng: Random,
        *,
        moves: bool,
    ) -> None:
        self._network = network
        self._served = served
        self._config = config
        self._host = host
        self._directory = directory
        self._rng = rng
        self._moves = moves
        self.moved = 0
        self.peer: Peer | None = None
        self.watcher = Watcher()
        """Hears what each of the peers does that live here."""

    async def live(self, span: Span, speed: Speed | None, dtype: str, stop: asyncio.Event) -> None:
        """Serve `span`, then whatever is needed more. `speed` is what is known before its blocks have been measured,
        and `dtype` what they will compute in.

        Raises what ends the network or the peer.
        """
        going_to: Span | None = span
        while going_to is not None:
            async with self._on_the_way(going_to, speed, dtype):
                loaded = await self._host.load(going_to)
            try:
                going_to, speed, dtype = await self._serve(loaded, stop)
            finally:
                self.peer = None
                await loaded.runner.close()
                del loaded  # its memory is needed for the next ones

    async def _serve(self, loaded: Loaded, stop: asyncio.Event) -> tuple[Span | None, Speed, str]:
        """Be a peer until it is time to go; where to, and what is known of this machine by then."""
        peer = Peer(
            self._network,
            loaded.runner,
            self._served,
            self._config,
            kv_tokens=loaded.kv_tokens,
            watcher=self.watcher,
        )
        async with peer:
            self.peer = peer
            await self._host.ready(peer)
            move = await self._stay(peer, stop)
            going_to = move.span if move is not None else None
            self._host.leaving(going_to)
            if move is not None:
                self.moved += 1
                peer.move_to(move.span, urgent=move.urgent)
        return going_to, peer.speed, loaded.runner.dtype

    @asynccontextmanager
    async def _on_the_way(self, span: Span, speed: Speed | None, dtype: str) -> AsyncIterator[None]:
        """Announce where this peer will serve, for as long as it loads; nothing while its speed is not known."""
        if speed is None:
            yield
            return
        incarnation = int(self._network.now() * 1000)

        def describe(state: PeerState) -> PeerRecord:
            return PeerRecord(
                peer=self._network.peer_id,
                name=self._config.name,
                model=self._served.model,
                digest=self._served.digest,
                model_blocks=self._served.model_blocks,
                span=span,
                state=state,
                incarnation=incarnation,
                announced_at=self._network.now(),
                addresses=self._network.contact.addresses,
                dtype=dtype,
                quantization=self._config.quantize,
                version=__version__,
                block_seconds=speed.first_row_s,
                row_seconds=speed.row_s,
                throughput=speed.throughput(len(span)),
                kv_free_tokens=0,
                kv_total_tokens=0,
            )

        announcer = Announcer(self._network, describe)
        tasks = TaskSet()
        await announcer.announce(PeerState.JOINING)
        tasks.spawn(announcer.serve(), "announcements of a peer that joins")
        try:
            yield
        finally:
            await tasks.close()

    async def _stay(self, peer: Peer, stop: asyncio.Event) -> Move | None:
        """Until it is time to go: the span to move to, None for good. Raises when the peer can no longer serve."""
        lookout = Lookout(self._directory, lambda: peer.describe(PeerState.ONLINE), self._rng)
        waits: list[asyncio.Task[object]] = [
            asyncio.create_task(_ends(stop.wait()), name="signal"),
            asyncio.create_task(_ends(self._network.failed.wait()), name="p2p daemon"),
            asyncio.create_task(_ends(peer.wait_failed()), name="peer"),
        ]
        move = asyncio.create_task(_ends(lookout.wait_for_move()), name="lookout") if self._moves else None
        try:
            await asyncio.wait([*waits, *([move] if move else [])], return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                if wait.done():
                    wait.result()
            if self._network.failed.is_set():
                raise LLMasOSError("the p2p daemon of this peer died", hint="start the peer again")
            if move is None or stop.is_set() or not move.done():
                return None
            found = move.result()
            assert isinstance(found, Move), "a lookout returns a move"
            return found
        finally:
            pending = [*waits, *([move] if move else [])]
            for wait in pending:
                wait.cancel()
            await asyncio.gather(*pending, return_exceptions=True)


async def _ends(work: Awaitable[object]) -> object:
    return await work
