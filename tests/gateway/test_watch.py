"""What the page is told of speed over time. In virtual time, without a swarm."""

import asyncio
from types import SimpleNamespace
from typing import Any

from llmasos.client.gateway_admission import Admission
from llmasos.client.gateway_metrics import Metrics
from llmasos.client.gateway_texts import Live
from llmasos.client.gateway_watch import SAMPLE_EVERY_S, Watch
from sim.loop import run


class EmptySwarm:
    """A client that sees nobody."""

    endpoints = ("somewhere",)

    async def status(self) -> dict[str, Any]:
        return {"models": []}

    def round_trips(self) -> dict[str, float]:
        return {}

    def relayed(self) -> list[str]:
        return []


def test_tokens_and_waits_are_counted_when_they_happen() -> None:
    """A wait for the first token in the sample behind it, while the text goes on, and never twice."""

    async def scene() -> None:
        swarm: Any = EmptySwarm()
        watch = Watch(swarm, Metrics(), Admission(1, 1, 1.0))
        sampling = asyncio.create_task(watch.run())
        live = Live("m", 3, began=0.0)
        texts: Any = SimpleNamespace(live={0: live})
        watch.texts["request"] = texts
        live.first_token_at, live.tokens = 2.0, 10
        await asyncio.sleep(SAMPLE_EVERY_S + 1)
        live.tokens = 35
        await asyncio.sleep(SAMPLE_EVERY_S)
        watch.finished("request")
        await asyncio.sleep(SAMPLE_EVERY_S)
        samples = watch.activity()["samples"]
        assert [sample["tokens_per_s"] for sample in samples] == [10 / SAMPLE_EVERY_S, 25 / SAMPLE_EVERY_S, 0.0]
        assert [sample.get("time_to_first_token_s") for sample in samples] == [2.0, None, None]
        sampling.cancel()

    run(scene())
