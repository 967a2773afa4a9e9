"""What a peer tells the registry, and how often. In virtual time."""

import asyncio

import pytest

from llmasos.config import ANNOUNCE_EVERY_S, INDEX_LEASE_S, LEASE_S
from llmasos.routing.directory import MODELS_TOPIC, Directory, model_topic
from sim.loop import run
from sim.network import SimNetwork, SimSwarm
from sim.swarm import SimCluster, SimModel

MODEL = SimModel(blocks=6)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The topics that anybody has written to, in order."""
    topics: list[str] = []
    honest = SimNetwork.publish

    async def publish(self: SimNetwork, topic: str, value: bytes, lease_s: float) -> bool:
        topics.append(topic)
        return await honest(self, topic, value, lease_s)

    monkeypatch.setattr(SimNetwork, "publish", publish)
    return topics


def test_the_list_of_models_is_written_less_often_than_the_record_and_never_lacks_the_model(written: list[str]) -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            await cluster.start("one", "0:6")
            directory = Directory(cluster.world.network("reader", listen=False))
            written.clear()
            for _ in range(180):
                await asyncio.sleep(1)
                await directory.refresh(MODEL.name)
                assert await directory.models() == [MODEL.name]
                assert directory.view.peers(MODEL.name)
            assert written.count(model_topic(MODEL.name)) == pytest.approx(180 / ANNOUNCE_EVERY_S, abs=1)
            assert written.count(MODELS_TOPIC) == pytest.approx(180 / (INDEX_LEASE_S / 3), abs=1)

    run(main())


def test_a_list_that_nobody_stored_is_written_again_with_the_next_record(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = 2
    honest = SimNetwork.publish

    async def publish(self: SimNetwork, topic: str, value: bytes, lease_s: float) -> bool:
        nonlocal refusals
        if topic == MODELS_TOPIC and refusals:
            refusals -= 1
            return False
        return await honest(self, topic, value, lease_s)

    monkeypatch.setattr(SimNetwork, "publish", publish)

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            await cluster.start("one", "0:6")
            directory = Directory(cluster.world.network("reader", listen=False))
            await asyncio.sleep(1.5 * ANNOUNCE_EVERY_S)
            assert await directory.models() == []
            await asyncio.sleep(ANNOUNCE_EVERY_S)
            assert await directory.models() == [MODEL.name]

    run(main())


def test_a_clock_that_is_set_back_does_not_keep_the_model_off_the_list(written: list[str]) -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            await cluster.start("one", "0:6")
            network = cluster.peers["one"].network
            assert isinstance(network, SimNetwork)
            network.skew_s = -300.0
            written.clear()
            await asyncio.sleep(1.5 * ANNOUNCE_EVERY_S)
            assert written.count(MODELS_TOPIC) == 1

    run(main(), start=1_000.0)


def test_of_a_killed_peer_the_name_of_its_model_stays_longest() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            await cluster.start("one", "0:6")
            directory = Directory(cluster.world.network("reader", listen=False))
            await asyncio.sleep(ANNOUNCE_EVERY_S / 2)
            cluster.kill("one")
            await asyncio.sleep(LEASE_S)
            await directory.refresh_all()
            assert directory.view.models() == []
            await asyncio.sleep(INDEX_LEASE_S - LEASE_S)
            assert await directory.models() == []

    run(main())
