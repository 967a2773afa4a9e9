"""What a gateway knows of its swarm and of itself over time: the page and the gauges are fed from here."""

import asyncio
import logging
import time
from collections import deque
from dataclasses import asdict
from typing import Any

from llmasos.client.async_client import AsyncLLMasOS
from llmasos.client.gateway_admission import Admission
from llmasos.client.gateway_metrics import Metrics
from llmasos.client.gateway_texts import Live, Texts
from llmasos.errors import LLMasOSError

log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 5.0
SAMPLES = 720
"""An hour."""
FAILOVERS_KEPT_S = 3_600.0


class Watch:
    """Keeps a view of the swarm that is no older than asked, samples of speed, and the failovers of the last hour."""

    def __init__(self, client: AsyncLLMasOS, metrics: Metrics, admission: Admission) -> None:
        self.texts: dict[str, Texts] = {}  # by request
        self._client = client
        self._metrics = metrics
        self._admission = admission
        self._status: dict[str, Any] = {"models": []}
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()
        self._samples: deque[dict[str, float]] = deque(maxlen=SAMPLES)
        self._failovers: deque[dict[str, Any]] = deque(maxlen=200)
        self._counted = 0
        self._finished_tokens = 0
        self._first_tokens_s: list[float] = []  # of texts that are finished
        self._sampled_at = float("-inf")

    async def status(self, max_age_s: float) -> dict[str, Any]:
        """The object of `llmasos status --json`. Those who ask at once share one look."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if now - self._looked_at > max_age_s:
                self._status = await self._client.status()
                self._looked_at = asyncio.get_running_loop().time()
                self._gauge()
            return self._status

    @property
    def age_s(self) -> float:
        """How long ago the swarm was looked at."""
        return asyncio.get_running_loop().time() - self._looked_at

    def finished(self, request: str) -> None:
        """A request is over, well or not: its texts are no longer live."""
        texts = self.texts.pop(request)
        for live in texts.live.values():
            self._finished_tokens += live.tokens
            self._first_tokens_s += self._begun_since_sample(live)

    def failed_over(self, live: Live, lost: list[dict[str, str]]) -> None:
        """A text has come to another route, because hops of its old one were lost."""
        why, live.cause = live.cause, ""
        self._failovers.append({"at": time.time(), "model": live.model, "lost": lost, "now": live.route, "why": why})

    def activity(self) -> dict[str, Any]:
        """What is going on here: running texts, recent failovers, speed over time. Nothing of what is written."""
        now = asyncio.get_running_loop().time()
        running = [
            {
                "request": request,
                "choice": index,
                "model": live.model,
                "running_s": now - live.began,
                "prompt_tokens": live.prompt_tokens,
                "tokens": live.tokens,
                "tokens_per_s": _speed(live, now),
                "failovers": live.failovers,
                "waiting": live.waiting,
                "route": live.route,
                "hops": [asdict(hop) for hop in step.hops] if (step := live.last_step) is not None else [],
            }
            for request, texts in self.texts.items()
            for index, live in texts.live.items()
            if not live.done
        ]
        recent = [event for event in self._failovers if event["at"] > time.time() - FAILOVERS_KEPT_S]
        return {
            "now": time.time(),
            "swarm_age_s": self.age_s if self._looked_at > 0 else None,
            "running": running,
            "waiting": self._admission.waiting,
            "failovers": recent[::-1],
            "samples": list(self._samples),
            "rtt_s": self._client.round_trips(),
            "relayed": self._client.relayed(),
            "join": list(self._client.endpoints),
        }

    async def run(self) -> None:
        """Sample, until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            try:
                await self.status(SAMPLE_EVERY_S)
            except LLMasOSError as error:
                log.warning("the swarm cannot be looked at: %s", error.message)
            lives = [live for texts in self.texts.values() for live in texts.live.values()]
            total = self._finished_tokens + sum(live.tokens for live in lives)
            first = self._first_tokens_s + [wait_s for live in lives for wait_s in self._begun_since_sample(live)]
            self._first_tokens_s, self._sampled_at = [], asyncio.get_running_loop().time()
            sample = {"at": time.time(), "tokens_per_s": max(total - self._counted, 0) / SAMPLE_EVERY_S}
            if first:
                sample["time_to_first_token_s"] = sum(first) / len(first)
            self._counted = total
            self._samples.append(sample)

    def _begun_since_sample(self, live: Live) -> list[float]:
        """How long it waited for its first token, if that came behind the last sample."""
        at = live.first_token_at
        return [at - live.began] if at is not None and at >= self._sampled_at else []

    def _gauge(self) -> None:
        self._metrics.peers.clear()
        self._metrics.weakest.clear()
        for model in self._status["models"]:
            online = [peer for peer in model["peers"] if peer["state"] == "online"]
            counts = [0] * model["blocks"]
            for peer in online:
                start, _, end = peer["blocks"].partition(":")
                for block in range(int(start), min(int(end), len(counts))):
                    counts[block] += 1
            self._metrics.peers.labels(model["model"]).set(len(online))
            self._metrics.weakest.labels(model["model"]).set(min(counts, default=0))


def _speed(live: Live, now: float) -> float:
    if live.first_token_at is None or live.tokens < 2 or now <= live.first_token_at:
        return 0.0
    return (live.tokens - 1) / (now - live.first_token_at)
