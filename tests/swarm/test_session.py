"""Shipped peers and shipped sessions, on the simulated seams, in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar

import pytest

from llmasos.client.events import Event, Rerouted, Waiting
from llmasos.client.session import Session
from llmasos.config import ClientConfig
from llmasos.errors import MissingBlocksError, UsageError
from sim.loop import run
from sim.network import SimSwarm
from sim.runner import from_numbers, reference, to_numbers
from sim.swarm import SimClient, SimCluster, SimModel

MODEL = SimModel(blocks=12)


def rows(count: int, start: int = 1) -> list[int]:
    return [start * 1_000_003 + 17 * n for n in range(count)]


async def feed(session: Session, numbers: list[int], **options: int) -> list[int]:
    return to_numbers(await session.forward(from_numbers(numbers), **options))


def in_swarm(
    spans: dict[str, str], scenario: Callable[[SimCluster, SimClient], Awaitable[None]], **options: ClientConfig
) -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=7), MODEL) as cluster:
            for name, span in spans.items():
                await cluster.start(name, span)
            async with cluster.client("client", **options) as client:
                await scenario(cluster, client)
            for peer in cluster.peers.values():
                peer.engine.scheduler.check()

    run(main())


@pytest.mark.parametrize(
    "spans",
    [
        {"a": "0:12"},
        {"a": "0:5", "b": "5:12"},
        {"a": "0:1", "b": "1:3", "c": "3:10", "d": "10:12"},
        {"a": "0:7", "b": "4:12"},  # entered in its middle, or left before its end
    ],
)
def test_any_split_gives_what_one_machine_gives(spans: dict[str, str]) -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        prompt, tail = rows(300), rows(9, start=2)
        expected = reference(12, prompt + tail)
        async with client.session() as session:
            assert await feed(session, prompt, keep=1) == expected[299:300]
            for index, row in enumerate(tail):
                assert await feed(session, [row]) == [expected[300 + index]]
            assert session.length == 309

    in_swarm(spans, scenario)


def test_keep_counts_rows_across_chunks() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        prompt = rows(300)
        async with client.session() as session:
            assert await feed(session, prompt, keep=200) == reference(12, prompt)[100:]
        async with client.session() as session:
            assert await feed(session, prompt, keep=0) == []

    in_swarm({"a": "0:5", "b": "5:12"}, scenario)


def test_a_lower_position_rolls_back() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        first, second = rows(40), rows(25, start=3)
        async with client.session() as session:
            await feed(session, first)
            assert await feed(session, second, position=10, keep=25) == reference(12, first[:10] + second)[10:]
            assert session.length == 35
            with pytest.raises(UsageError, match="hole"):
                await session.forward(from_numbers(rows(1)), position=36)

    in_swarm({"a": "0:5", "b": "5:12"}, scenario)


def test_zero_rows_are_a_step_too() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            assert await feed(session, []) == []
            assert session.length == 0

    in_swarm({"a": "0:12"}, scenario)


def test_sessions_share_passes() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async def one(index: int) -> None:
            prompt = rows(20, start=index + 1)
            async with client.session(64) as session:
                assert await feed(session, prompt) == reference(12, prompt)[-1:]
                for step in range(30):
                    await feed(session, rows(1, start=step + 2))

        async with asyncio.TaskGroup() as group:
            for index in range(16):
                group.create_task(one(index))
        for peer in cluster.peers.values():
            assert peer.engine.passes < 16 * 31 / 4  # had they run one by one, it would have been all of them
            await asyncio.wait_for(peer.handler.wait_until_idle(), 1)
            assert peer.engine.scheduler.kv_free_tokens == peer.engine.scheduler.kv_tokens

    in_swarm({"a": "0:5", "b": "5:12"}, scenario)


def test_missing_blocks_are_named() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        with pytest.raises(MissingBlocksError) as caught:
            async with client.session():
                pass
        assert caught.value.missing == ["5:8"]
        assert "--blocks 5:8" in caught.value.hint

    in_swarm({"a": "0:5", "b": "8:12"}, scenario)


def test_a_full_peer_is_passed_over() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=3), MODEL) as cluster:
            await cluster.start("small", "0:12", kv_tokens=100)
            await cluster.start("large", "0:12", kv_tokens=10_000)
            async with cluster.client("client") as client, client.session(500) as session:
                assert session.route.hops[0].peer == cluster.peers["large"].network.peer_id

    run(main())


class TestFailover:
    """A peer that goes away changes nothing of what comes out."""

    SPANS: ClassVar = {"a1": "0:4", "a2": "0:4", "b1": "4:9", "b2": "4:9", "c1": "9:12", "c2": "9:12"}

    @pytest.mark.parametrize("position", [0, 1, 2])
    @pytest.mark.parametrize("fault", ["kill", "hang"])
    def test_one_hop(self, position: int, fault: str) -> None:
        async def scenario(cluster: SimCluster, client: SimClient) -> None:
            prompt = rows(300)
            expected = reference(12, prompt + rows(6, start=9))
            async with client.session() as session:
                assert await feed(session, prompt) == expected[299:300]
                assert await feed(session, rows(6, start=9)[:3]) == expected[302:303]
                before = session.route
                getattr(cluster.world, fault)(before.hops[position].peer)
                for index in range(3, 6):
                    assert await feed(session, [rows(6, start=9)[index]]) == [expected[300 + index]]
                after = session.route
                assert session.failovers == 1
                assert session.replayed_tokens == 303
                changed = [old.peer != new.peer for old, new in zip(before.hops, after.hops, strict=True)]
                assert changed == [index == position for index in range(3)]

        in_swarm(self.SPANS, scenario)

    def test_in_the_middle_of_a_prompt(self) -> None:
        async def scenario(cluster: SimCluster, client: SimClient) -> None:
            prompt = rows(900)
            async with client.session() as session:
                work = asyncio.create_task(feed(session, prompt))
                await asyncio.sleep(0.5)
                assert 0 < session.length < 900
                cluster.world.kill(session.route.hops[1].peer)
                assert await work == reference(12, prompt)[-1:]
                assert session.failovers == 1

        in_swarm(self.SPANS, scenario)

    def test_two_at_once_side_by_side(self) -> None:
        async def scenario(cluster: SimCluster, client: SimClient) -> None:
            prompt = rows(50)
            async with client.session() as session:
                await feed(session, prompt)
                for hop in session.route.hops[:2]:
                    cluster.world.kill(hop.peer)
                more = rows(5, start=4)
                assert await feed(session, more, keep=5) == reference(12, prompt + more)[50:]

        in_swarm(self.SPANS, scenario)

    def test_a_larger_peer_takes_over_for_several(self) -> None:
        async def scenario(cluster: SimCluster, client: SimClient) -> None:
            prompt = rows(50)
            async with client.session() as session:
                await feed(session, prompt)
                victims = [hop.peer for hop in session.route.hops]
                await cluster.start("whole", "0:12")
                for victim in victims:
                    cluster.world.kill(victim)
                more = rows(5, start=4)
                assert await feed(session, more, keep=5) == reference(12, prompt + more)[50:]

        in_swarm({"a": "0:4", "b": "4:9", "c": "9:12"}, scenario)

    def test_no_replacement_waits_and_resumes(self) -> None:
        async def scenario(cluster: SimCluster, client: SimClient) -> None:
            prompt = rows(30)
            async with client.session() as session:
                await feed(session, prompt)
                told: list[Event] = []
                session._on_event = told.append
                cluster.kill("b")
                work = asyncio.create_task(feed(session, rows(1, start=5)))
                await asyncio.sleep(10)
                assert not work.done()
                assert session.waiting is not None
                assert str(session.waiting).startswith("blocks 4:9 of simulated have no peer: waiting for one, 2")
                await cluster.start("b again", "4:9")
                assert await work == reference(12, prompt + rows(1, start=5))[-1:]
                assert session.waiting is None
                *waiting, last = told
                assert 9 <= len(waiting) <= 12  # once a second
                assert all(isinstance(event, Waiting) for event in waiting)
                assert isinstance(last, Rerouted)

        in_swarm({"a": "0:4", "b": "4:9", "c": "9:12"}, scenario)

    def test_no_replacement_ever(self) -> None:
        async def scenario(cluster: SimCluster, client: SimClient) -> None:
            async with client.session() as session:
                await feed(session, rows(30))
                cluster.kill("b")
                with pytest.raises(MissingBlocksError) as caught:
                    await feed(session, rows(1))
                assert caught.value.missing == ["4:9"]

        in_swarm({"a": "0:4", "b": "4:9", "c": "9:12"}, scenario)

    def test_two_peers_that_cannot_reach_each_other_are_relayed(self) -> None:
        async def scenario(cluster: SimCluster, client: SimClient) -> None:
            a, b = (cluster.peers[name].network.peer_id for name in ("a", "b"))
            cluster.world.partition([a], [b])
            prompt = rows(300)
            async with client.session() as session:
                assert await feed(session, prompt) == reference(12, prompt)[-1:]
                more = rows(5, start=4)
                assert await feed(session, more, keep=3) == reference(12, prompt + more)[-3:]
                assert session.failovers == 0

        in_swarm({"a": "0:4", "b": "4:9", "c": "9:12"}, scenario)
