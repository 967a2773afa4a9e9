"""What a peer counts, for Prometheus. The names are part of the interface: docs/observability.md lists them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from llmasos import __version__
from llmasos.errors import UsageError
from llmasos.peer.peer import Peer
from llmasos.peer.watcher import Watcher

READ_TIMEOUT_S = 5.0
"""For the event loop to say how things stand; it never computes, so that it answers within milliseconds."""
PASSES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)


class PeerMetrics(Watcher):
    """A peer process's counters, in a registry of their own. They go on when the peer moves to other blocks."""

    def __init__(self, peer: Callable[[], Peer | None]) -> None:
        """`peer` says who serves here now."""
        self.registry = CollectorRegistry()
        here = self.registry
        self._tokens = Counter("llmasos_peer_tokens", "Rows computed, one a token.", registry=here)
        self._pass_s = Histogram(
            "llmasos_peer_pass_seconds", "A forward pass over all rows of a batch.", buckets=PASSES_S, registry=here
        )
        self._batch = Histogram("llmasos_peer_batch_tokens", "Rows of a pass.", buckets=BATCHES, registry=here)
        self._queue_s = Histogram(
            "llmasos_peer_queue_seconds", "A step's wait for its passes.", buckets=PASSES_S, registry=here
        )
        self._found = Counter(
            "llmasos_peer_prefix_tokens", "Rows of prompts that were cached from earlier sessions.", registry=here
        )
        self._refused = Counter("llmasos_peer_sessions_refused", "Sessions not admitted.", ["reason"], registry=here)
        self.registry.register(_Now(peer, asyncio.get_running_loop()))
        ProcessCollector(registry=here)

    def ran(self, tokens: int, seconds: float) -> None:
        """See `Watcher.ran`."""
        self._tokens.inc(tokens)
        self._batch.observe(tokens)
        self._pass_s.observe(seconds)

    def waited(self, seconds: float) -> None:
        """See `Watcher.waited`."""
        self._queue_s.observe(seconds)

    def found(self, tokens: int) -> None:
        """See `Watcher.found`."""
        self._found.inc(tokens)

    def refused(self, why: str) -> None:
        """See `Watcher.refused`."""
        self._refused.labels(why).inc()

    @asynccontextmanager
    async def serve(self, host: str, port: int) -> AsyncIterator[str]:
        """Answer Prometheus on a thread of its own; the address. Raises UsageError for a port that is taken."""
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise UsageError(
                f"cannot serve metrics on {host} port {port}: {error.strerror or error}",
                hint="take another --metrics-port; 0 takes a free one",
            ) from error
        try:
            shown = f"[{host}]" if ":" in host else host
            yield f"http://{shown}:{server.server_port}/metrics"
        finally:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            thread.join()


class _Now(Collector):
    """How things stand at the moment of asking. Asked on a thread, answered by the event loop, which owns them."""

    def __init__(self, peer: Callable[[], Peer | None], loop: asyncio.AbstractEventLoop) -> None:
        self._peer = peer
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        """As Prometheus' library wants it."""
        yield from asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(READ_TIMEOUT_S)

    async def _read(self) -> list[Metric]:
        peer = self._peer()
        if peer is None:
            return []  # it is moving, and serves nobody
        about = {
            "model": peer.served.model,
            "blocks": str(peer.runner.span),
            "dtype": peer.runner.dtype,
            "peer": peer.network.peer_id,
            "version": __version__,
        }
        scheduler = peer.engine.scheduler
        used = scheduler.kv_tokens - scheduler.kv_free_tokens
        return [
            InfoMetricFamily("llmasos_peer", "What this peer serves.", about),
            _gauge("sessions", "Sessions that are open.", scheduler.active_sessions),
            _gauge("queued_tokens", "Rows that wait for a pass.", scheduler.queued_tokens),
            _gauge("kv_used_tokens", "Cached tokens that sessions have reserved room for.", used),
            _gauge("kv_free_tokens", "Cached tokens that there is room for.", scheduler.kv_free_tokens),
            _gauge("draining", "1 while this peer sends its sessions elsewhere.", int(peer.handler.draining)),
        ]


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"llmasos_peer_{name}", meaning, value)
