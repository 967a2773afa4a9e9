"""The registry as strangers fill it. In virtual time, in front of a registry that is a dictionary."""

import asyncio
import json
from typing import Any

import pytest

from llmasos.config import LEASE_S, MAX_RECORD_BYTES
from llmasos.errors import LLMasOSError, SwarmUnreachableError
from llmasos.network import PeerId, Published
from llmasos.routing.directory import LOOKUPS_AT_ONCE, MAX_MODELS, MODELS_TOPIC, Directory, model_topic
from sim.loop import run
from tests.routing.builders import NOW, a_record

LOOKUP_S = 0.3


class Registry:
    """The part of a network that a directory asks. A look-up takes LOOKUP_S; topics in `silent` are not answered."""

    peer_id = PeerId("me")

    def __init__(self, *named: str) -> None:
        self.silent: set[str] = set()
        self.under_way = self.most_at_once = self.asked = 0
        self._topics: dict[str, dict[PeerId, Published]] = {MODELS_TOPIC: {}}
        for model in named:
            self.serve(model)

    def serve(self, model: str) -> None:
        """One more peer announces the model."""
        peer = f"peer{len(self._topics[MODELS_TOPIC])}"
        self.publish(peer, MODELS_TOPIC, json.dumps({"model": model}).encode())
        self.publish(peer, model_topic(model), a_record(peer, model=model, announced_at=NOW).to_bytes())

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def publish(self, peer: str, topic: str, value: bytes) -> None:
        self._topics.setdefault(topic, {})[PeerId(peer)] = Published(PeerId(peer), value, NOW + LEASE_S)

    async def lookup(self, topic: str) -> dict[PeerId, Published]:
        self.asked += 1
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        await asyncio.sleep(LOOKUP_S)
        self.under_way -= 1
        if topic in self.silent:
            raise SwarmUnreachableError("the registry did not answer")
        return {peer: entry for peer, entry in self._topics.get(topic, {}).items() if self.now() < entry.expires_at}


def directory_of(registry: Registry) -> Directory:
    network: Any = registry
    return Directory(network)


HOSTILE = {
    "a lone surrogate": b'{"model": "\\ud800"}',
    "an endless name": json.dumps({"model": "m" * 129}).encode(),
    "an empty name": b'{"model": ""}',
    "a line break": b'{"model": "a\\nb"}',
    "a mark that turns the text around": b'{"model": "\\u202e2mlloms"}',
    "no text": b'{"model": 7}',
    "no object": b"[]",
    "no JSON": b"\xff",
    "a thousand brackets": b"[" * MAX_RECORD_BYTES,
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_name_of_a_model_is_passed_over(value: bytes) -> None:
    registry = Registry("smollm2", "m" * 128)
    registry.publish("mallory", MODELS_TOPIC, value)
    assert run(directory_of(registry).models(), start=NOW) == ["m" * 128, "smollm2"]


def test_a_model_that_cannot_be_looked_up_keeps_no_other_from_sight() -> None:
    registry = Registry("llama", "smollm2")
    registry.silent.add(model_topic("llama"))
    directory = directory_of(registry)
    run(directory.refresh_all(), start=NOW)
    assert directory.view.models() == ["smollm2"]


@pytest.mark.parametrize("topics", [[MODELS_TOPIC], [model_topic("llama"), model_topic("smollm2")]])
def test_a_registry_that_does_not_answer_is_told(topics: list[str]) -> None:
    registry = Registry("llama", "smollm2")
    registry.silent.update(topics)
    with pytest.raises(LLMasOSError, match="did not answer"):
        run(directory_of(registry).refresh_all(), start=NOW)


def test_a_swarm_that_is_gone_is_gone_from_sight() -> None:
    """Nobody names its models any more, so that nothing is left to look up."""

    async def scene() -> list[str]:
        directory = directory_of(Registry("smollm2"))
        await directory.refresh_all()
        assert directory.view.models() == ["smollm2"]
        await asyncio.sleep(LEASE_S)
        await directory.refresh_all()
        return directory.view.models()

    assert run(scene(), start=NOW) == []


def test_many_models_are_looked_up_together_but_not_all_at_once() -> None:
    """Forty names cost three round trips behind that of the names, not forty."""
    registry = Registry(*[f"m{number}" for number in range(40)])

    async def scene() -> float:
        await directory_of(registry).refresh_all()
        return registry.now() - NOW

    assert run(scene(), start=NOW) == pytest.approx(4 * LOOKUP_S)
    assert registry.most_at_once == LOOKUPS_AT_ONCE


def test_a_session_does_not_wait_for_the_look_at_all_models() -> None:
    registry = Registry(*[f"m{number}" for number in range(40)])

    async def scene() -> None:
        directory = directory_of(registry)
        looking = asyncio.create_task(directory.refresh_all())
        await asyncio.sleep(1.5 * LOOKUP_S)
        began = registry.now()
        await directory.refresh("m7")
        assert registry.now() - began <= LOOKUP_S
        await looking

    run(scene(), start=NOW)


def test_who_asks_for_a_model_at_once_shares_one_look_up() -> None:
    registry = Registry("llama", "smollm2")

    async def scene() -> None:
        directory = directory_of(registry)
        await asyncio.gather(*[directory.refresh(model) for model in ("smollm2", "llama", "smollm2", "smollm2")])

    run(scene(), start=NOW)
    assert registry.asked == 2


def test_names_of_strangers_crowd_out_no_model_that_is_served() -> None:
    """Names are free: what most peers serve is looked up first, and what is known stays."""
    registry = Registry("smollm2", "smollm2", *[f"a{number}" for number in range(MAX_MODELS + 5)])

    async def scene() -> None:
        directory = directory_of(registry)
        await directory.refresh_all()
        assert registry.asked == 1 + MAX_MODELS
        assert "smollm2" in directory.view.models()
        for number in range(2 * MAX_MODELS):
            for _ in range(3):
                registry.serve(f"b{number}")
        await directory.refresh_all()
        assert directory.age_s("smollm2") == pytest.approx(0.0, abs=2 * LOOKUP_S * MAX_MODELS / LOOKUPS_AT_ONCE)
        assert not any(model.startswith("b") for model in directory.view.models())
        assert len(await directory.models()) == 1 + MAX_MODELS + 5 + 2 * MAX_MODELS

    run(scene(), start=NOW)


def test_when_a_model_was_looked_up_is_forgotten_with_its_name() -> None:
    async def scene() -> None:
        registry = Registry("smollm2")
        directory = directory_of(registry)
        await directory.refresh_all()
        assert directory.age_s("smollm2") == 0.0
        await asyncio.sleep(LEASE_S)
        await directory.refresh_all()
        assert directory.age_s("smollm2") == float("inf")

    run(scene(), start=NOW)
