"""A peer's life: joining -> online -> draining -> offline."""

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType
from typing import Self

from llmasos import __version__
from llmasos.config import MOVE_DRAIN_S, URGENT_DRAIN_S, PeerConfig
from llmasos.network import Network
from llmasos.peer.announce import Announcer
from llmasos.peer.engine import Engine
from llmasos.peer.handler import Handler, Served
from llmasos.peer.runner import Runner, Speed
from llmasos.peer.scheduler import Scheduler
from llmasos.peer.watcher import Watcher
from llmasos.routing.records import PeerRecord, PeerState
from llmasos.span import Span
from llmasos.wire import PROTOCOL

log = logging.getLogger(__name__)


class Peer:
    """Serves the runner's blocks over the network. An async context manager: online inside, offline after.

    It takes over neither: whoever made the network and the runner closes them.
    """

    def __init__(
        self,
        network: Network,
        runner: Runner,
        served: Served,
        config: PeerConfig,
        *,
        kv_tokens: int,
        watcher: Watcher | None = None,
    ) -> None:
        self.network = network
        self.runner = runner
        self.served = served
        self.engine = Engine(runner, Scheduler(kv_tokens, config.max_batch_tokens), network.now, watcher)
        self.handler = Handler(network, self.engine, served, watcher)
        self.announcer = Announcer(network, self.describe)
        self.speed: Speed
        self._config = config
        self._incarnation = int(network.now() * 1000)
        self._next_span: Span | None = None
        self._drain_timeout_s = config.drain_timeout_s
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        """Measure, serve, announce. The peer is ready when this returns."""
        self._failed = asyncio.get_running_loop().create_future()
        self.speed = await self.runner.measure()
        blocks = len(self.runner.span)
        self.engine.expect(self.speed.first_row_s * blocks, self.speed.row_s * blocks)
        self._start(self.engine.serve(), "engine")
        self.network.serve(PROTOCOL, self.handler)
        await self.announcer.announce(PeerState.ONLINE)
        self._start(self.announcer.serve(), "announcer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what runs, say goodbye, stop."""
        await self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.handler.cut_off()
        await self.announcer.announce(PeerState.OFFLINE if self._next_span is None else PeerState.JOINING)

    def move_to(self, span: Span, *, urgent: bool) -> None:
        """Say where this peer is going to be found: it is left for good, and others can count on it there."""
        self._next_span = span
        self._drain_timeout_s = min(self._drain_timeout_s, URGENT_DRAIN_S if urgent else MOVE_DRAIN_S)

    async def wait_failed(self) -> None:
        """Return never, or raise what ended the engine or the announcer: a peer that cannot compute must not stay."""
        assert self._failed is not None, "the peer has not been started"
        await asyncio.shield(self._failed)

    async def drain(self) -> None:
        """Take no new session, and give the running ones a while to move elsewhere or to end."""
        if self.handler.draining:
            return
        moving = self._next_span is not None
        self.handler.drain()
        await self.announcer.announce(PeerState.JOINING if moving else PeerState.DRAINING)
        if self.handler.sessions:
            log.info("draining: %d sessions still run", self.handler.sessions)
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await self.handler.wait_until_idle()
        except TimeoutError:
            log.warning("%d sessions did not end in %.0f s", self.handler.sessions, self._drain_timeout_s)

    def describe(self, state: PeerState) -> PeerRecord:
        """The record of this moment."""
        scheduler = self.engine.scheduler
        return PeerRecord(
            peer=self.network.peer_id,
            name=self._config.name,
            model=self.served.model,
            digest=self.served.digest,
            model_blocks=self.served.model_blocks,
            span=self._next_span or self.runner.span,
            state=state,
            incarnation=self._incarnation,
            announced_at=self.network.now(),
            addresses=self.network.contact.addresses,
            dtype=self.runner.dtype,
            quantization=self._config.quantize,
            version=__version__,
            block_seconds=self.speed.first_row_s,
            row_seconds=self.speed.row_s,
            throughput=self.speed.throughput(len(self._next_span or self.runner.span)),
            active_sessions=scheduler.active_sessions,
            queued_tokens=scheduler.queued_tokens,
            kv_free_tokens=scheduler.kv_free_tokens,
            kv_total_tokens=scheduler.kv_tokens,
        )

    def _start(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._note_end)
        self._tasks.append(task)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if self._failed is None or self._failed.done() or task.cancelled():
            return
        error = task.exception() or RuntimeError(f"{task.get_name()} ended by itself")
        self._failed.set_exception(error)
