"""Peers that choose their blocks themselves: they settle, heal gaps, and do not run in herds. In virtual time."""

import asyncio
import logging
import re
from collections import Counter
from random import Random

import pytest

from llmasos.config import LEASE_S, MIN_STAY_S, URGENT_DRAIN_S
from llmasos.peer.runner import Speed
from llmasos.routing.directory import Directory
from sim.auto import AutoPeer
from sim.loop import run
from sim.network import SimSwarm, peer_of
from sim.runner import reference
from sim.swarm import CPU_SPEED, SimCluster, SimModel
from tests.swarm.test_session import feed, rows

MODEL = SimModel(blocks=30)


def strengths(cluster: SimCluster) -> list[int]:
    """How many peers are online for each block."""
    return [sum(block in peer.runner.span for peer in cluster.peers.values()) for block in range(MODEL.blocks)]


async def start(
    cluster: SimCluster, count: int, max_blocks: int, *, apart_s: float = 0.0, seed: int = 0
) -> list[AutoPeer]:
    peers = [
        AutoPeer(cluster, f"auto{number}", max_blocks, seed=1_000 * seed + number, load_s=3.0 + number % 5)
        for number in range(count)
    ]
    for peer in peers:
        await peer.start()
        await asyncio.sleep(apart_s)
    return peers


@pytest.mark.parametrize(("count", "max_blocks", "mixed"), [(100, 10, False), (40, 4, False), (40, 7, True)])
def test_peers_that_start_together_settle(count: int, max_blocks: int, mixed: bool) -> None:
    async def main() -> None:
        rng = Random(1)
        async with SimCluster(SimSwarm(seed=1, stale_s=2.0), MODEL) as cluster:
            peers = await start(cluster, count, max_blocks)
            for peer in peers:
                factor = rng.choice([0.5, 1.0, 2.0]) if mixed else 1.0
                peer.speed = Speed(CPU_SPEED.first_row_s * factor, CPU_SPEED.row_s * factor)
            await asyncio.sleep(60)
            assert min(strengths(cluster)) > 0  # whole within a minute
            await asyncio.sleep(2 * MIN_STAY_S)
            moves = sum(len(peer.spans) - 1 for peer in peers)
            await asyncio.sleep(MIN_STAY_S)
            assert sum(len(peer.spans) - 1 for peer in peers) == moves  # settled: nobody moves any more
            assert moves <= count / 2
            assert max(len(peer.spans) for peer in peers) <= 3
            assert min(strengths(cluster)) >= count * max_blocks / MODEL.blocks / 2

    run(main())


def test_peers_that_come_one_by_one_stay_where_they_are() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=5), MODEL) as cluster:
            peers = await start(cluster, 12, 10, apart_s=10.0)
            await asyncio.sleep(900)
            assert [len(peer.spans) for peer in peers] == [1] * 12
            assert strengths(cluster) == [4] * 30

    run(main())


@pytest.mark.parametrize("seed", range(5))
def test_a_range_that_loses_its_only_holder_is_whole_again_within_a_minute(seed: int) -> None:
    """Three peers would do; of the four, those that hold the same range can spare one."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=seed), MODEL) as cluster:
            peers = await start(cluster, 4, 10, apart_s=10.0, seed=seed)
            await asyncio.sleep(30)
            held = Counter(peer.spans[-1][1] for peer in peers)
            victim = next(peer for peer in peers if held[peer.spans[-1][1]] == 1)
            async with cluster.client("client") as client, client.session() as session:
                prompt = rows(100)
                await feed(session, prompt)
                cluster.kill(victim.name)
                died_at = asyncio.get_running_loop().time()
                while min(strengths(cluster)) == 0:  # noqa: ASYNC110 - virtual seconds
                    await asyncio.sleep(0.5)
                assert asyncio.get_running_loop().time() - died_at < 60
                await asyncio.sleep(60)
                assert sum(len(peer.spans) - 1 for peer in peers) == 1  # one was enough, and only one went
                assert await feed(session, rows(1)) == reference(30, prompt + rows(1))[-1:]

    run(main())


def test_no_herd_runs_into_a_gap() -> None:
    """The 27 peers that are left see the same gap; no more of them move than the gap should have."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=8, stale_s=1.0), MODEL) as cluster:
            peers = await start(cluster, 40, 10, apart_s=1.0)
            await asyncio.sleep(600)
            gone = [peer for peer in peers if peer.spans[-1][1].start == 10]
            before = {peer.name: len(peer.spans) for peer in peers}
            for peer in gone:
                cluster.kill(peer.name)
            await asyncio.sleep(60)
            assert min(strengths(cluster)) > 0
            moves = sum(len(peer.spans) - before[peer.name] for peer in peers)
            assert moves <= 9, f"{moves} of 27"  # a third each is what would be best
            await asyncio.sleep(2 * MIN_STAY_S)
            assert min(strengths(cluster)) >= 6  # 27 peers over three ranges

    run(main())


def test_sessions_of_a_peer_that_moves_do_not_notice() -> None:
    """Two fixed peers leave a gap; one of those that hold the other range moves, and its sessions are handed over."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=4), MODEL) as cluster:
            await cluster.start("fixed", "15:30")
            peers = await start(cluster, 3, 15, apart_s=20.0)
            await cluster.start("fixed too", "15:30")
            async with cluster.client("client") as client:
                sessions = [client.session() for _ in range(6)]
                prompts = [rows(60, start=number + 1) for number in range(6)]
                for session, prompt in zip(sessions, prompts, strict=True):
                    await session.__aenter__()
                    await feed(session, prompt)
                for name in [name for name, peer in cluster.peers.items() if peer.runner.span.start == 15]:
                    cluster.kill(name)
                tail = rows(80, start=77)
                for index in range(80):
                    for session, prompt in zip(sessions, prompts, strict=True):
                        expected = reference(30, prompt + tail[: index + 1])[-1:]
                        assert await feed(session, tail[index : index + 1]) == expected
                    await asyncio.sleep(0.5)
                assert sum(len(peer.spans) - 1 for peer in peers) == 1
                for session in sessions:
                    await session.close()

    run(main())


def test_who_brings_missing_blocks_is_not_held_up_by_sessions_that_wait_for_them() -> None:
    """All sessions are in the middle of a text and go through the peers that could move; none can take a step."""

    async def main() -> None:
        left: list[float] = []
        async with SimCluster(SimSwarm(seed=4), MODEL) as cluster:
            loop = asyncio.get_running_loop()
            await cluster.start("fixed", "15:30")
            peers = await start(cluster, 2, 15, apart_s=20.0)
            for peer in peers:
                assert cluster.peers[peer.name].runner.span.start == 0
                peer.went = lambda going_to: left.append(loop.time())
            async with cluster.client("client") as client:
                sessions = [client.session() for _ in range(6)]
                prompts = [rows(60, start=number + 1) for number in range(6)]
                for session, prompt in zip(sessions, prompts, strict=True):
                    await session.__aenter__()
                    await feed(session, prompt)
                cluster.kill("fixed")
                work = [asyncio.create_task(feed(session, rows(1))) for session in sessions]
                assert await asyncio.gather(*work) == [reference(30, prompt + rows(1))[-1:] for prompt in prompts]
                [mover] = [peer for peer in peers if len(peer.spans) > 1]
                [left_at, (came_at, _)] = left + mover.spans[1:]
                assert came_at - left_at < mover.load_s + URGENT_DRAIN_S + 0.5
                for session in sessions:
                    await session.close()

    run(main())


def test_the_same_identity_counts_once() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=4), MODEL) as cluster:
            await cluster.start("a", "0:30")
            cluster.kill("a")
            await asyncio.sleep(1)
            again = AutoPeer(cluster, "a", 10, seed=1)
            await again.start(cluster.world.restart(peer_of("a")))
            async with cluster.client("client") as client:
                directory = Directory(client.network)
                await asyncio.sleep(1)
                for state in ("joining", "online"):
                    await directory.refresh("simulated")
                    (record,) = directory.view.peers("simulated")  # the old one is not seen beside it, nor instead
                    assert (str(record.state), len(record.span)) == (state, 10)
                    await asyncio.sleep(LEASE_S)

    run(main())


@pytest.mark.parametrize("skew_s", [-300.0, 300.0])
def test_a_clock_that_is_minutes_off_is_named(skew_s: float, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=4), MODEL) as cluster:
            await cluster.start("right", "0:30")
            await asyncio.sleep(1_000)
            place = cluster.world.network("wrong")
            place.skew_s = skew_s
            await cluster.start("wrong", "0:30", network=place)
            if skew_s < 0:  # what it sees itself; the other way round it sees leases that have ended, which is nothing
                await Directory(place).refresh("simulated")
            async with cluster.client("client") as client:
                await client.router.directory.refresh("simulated")
                known = client.router.directory.view.peers("simulated")
                assert [record.name for record in known] == ["right"]  # nobody is led to a peer that may be a ghost

    with caplog.at_level(logging.WARNING):
        run(main())
    assert any(re.search(r"clock .*(29\d|300) s (slow|fast)", record.getMessage()) for record in caplog.records)
