"""A peer that is asked to stop hands its sessions over; whoever generates through it does not notice."""

import asyncio
from collections.abc import Callable

import pytest

from llmasos.config import PeerConfig
from sim.loop import run
from sim.network import SimSwarm
from sim.runner import reference
from sim.swarm import SimClient, SimCluster, SimModel
from tests.swarm.test_session import feed, in_swarm, rows

MODEL = SimModel(blocks=12)
PROMPT, TAIL = rows(300), rows(40, start=5)
EXPECTED = reference(12, PROMPT + TAIL)
TWICE = {"a1": "0:4", "a2": "0:4", "b1": "4:9", "b2": "4:9", "c1": "9:12", "c2": "9:12"}


def named(cluster: SimCluster, peer: str) -> str:
    return next(name for name, member in cluster.peers.items() if member.network.peer_id == peer)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - virtual seconds
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_another_peer_takes_over_at_the_next_step(position: int) -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        loop = asyncio.get_running_loop()
        async with client.session() as session:
            await feed(session, PROMPT)
            old = session.route.peers[position]
            stopping = asyncio.create_task(cluster.stop(named(cluster, old)))
            await asyncio.sleep(0.1)
            assert not stopping.done()  # it has a session, and waits for it
            for index, row in enumerate(TAIL):
                assert await feed(session, [row]) == [EXPECTED[300 + index]]
                if index == 0:
                    moved_at = loop.time()
            assert old not in session.route.peers
            assert (session.failovers, session.replayed_tokens) == (0, 300)
            await stopping
            assert loop.time() - moved_at < 2  # it went as soon as it was left, not when the session ended

    in_swarm(TWICE, scenario)


def test_all_at_once() -> None:
    """Every peer of the route goes at the same time, as when a data centre is given up."""

    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await feed(session, PROMPT)
            leaving = [asyncio.create_task(cluster.stop(named(cluster, peer))) for peer in session.route.peers]
            await asyncio.sleep(0.1)
            assert await feed(session, TAIL, keep=40) == EXPECTED[300:]
            assert session.failovers == 0
            await asyncio.gather(*leaving)

    in_swarm(TWICE, scenario)


def test_where_nobody_else_has_the_blocks_it_stays_to_the_end() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await feed(session, PROMPT)
            stopping = asyncio.create_task(cluster.stop("b"))
            for index, row in enumerate(TAIL):
                assert await feed(session, [row]) == [EXPECTED[300 + index]]
            assert not stopping.done()
            assert (session.failovers, session.replayed_tokens) == (0, 0)
        await asyncio.wait_for(stopping, 1)

    in_swarm({"a": "0:4", "b": "4:9", "c": "9:12"}, scenario)


def test_somebody_who_comes_later_takes_over() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await feed(session, PROMPT)
            stopping = asyncio.create_task(cluster.stop("b"))
            await feed(session, TAIL[:1])
            await cluster.start("whole", "0:12")
            for index, row in enumerate(TAIL[1:21], start=1):
                assert await feed(session, [row]) == [EXPECTED[300 + index]]
                await asyncio.sleep(0.5)
            await asyncio.wait_for(stopping, 1)
            assert (session.failovers, session.replayed_tokens) == (0, 301)

    in_swarm({"a": "0:4", "b": "4:9", "c": "9:12"}, scenario)


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_the_newcomer_fails_while_it_catches_up(fault: str) -> None:
    """The old hop is still there, and takes its place again as if nothing had been."""

    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await feed(session, PROMPT)
            old = session.route.peers[1]
            asyncio.create_task(cluster.stop(named(cluster, old)))  # noqa: RUF006
            await asyncio.sleep(0.1)
            work = asyncio.create_task(feed(session, TAIL[:1]))
            await until(lambda: session.route.peers[1] != old)
            await asyncio.sleep(0.05)
            getattr(cluster.world, fault)(session.route.peers[1])
            assert await work == EXPECTED[300:301]
            assert session.route.peers[1] == old
            assert session.failovers == 0
            assert await feed(session, TAIL[1:], keep=39) == EXPECTED[301:]

    in_swarm({"a": "0:4", "b1": "4:9", "b2": "4:9", "c": "9:12"}, scenario)


def test_the_peer_before_dies_while_the_newcomer_catches_up() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await feed(session, PROMPT)
            old = session.route.peers[1]
            stopping = asyncio.create_task(cluster.stop(named(cluster, old)))
            await asyncio.sleep(0.1)
            work = asyncio.create_task(feed(session, TAIL, keep=40))
            await until(lambda: session.route.peers[1] != old)
            await asyncio.sleep(0.05)
            cluster.world.kill(session.route.peers[0])
            assert await work == EXPECTED[300:]
            assert session.failovers == 1
            assert old not in session.route.peers
            await stopping

    in_swarm(TWICE, scenario)


def test_who_does_not_leave_in_time_is_left_behind() -> None:
    """The session is idle: the peer goes when its time is up, and failover repairs what it leaves."""

    async def main() -> None:
        config = PeerConfig(drain_timeout_s=7.0)
        async with SimCluster(SimSwarm(seed=7), MODEL, config=config) as cluster:
            for name, span in TWICE.items():
                await cluster.start(name, span)
            async with cluster.client("client") as client, client.session() as session:
                await feed(session, PROMPT)
                begin = asyncio.get_running_loop().time()
                await cluster.stop(named(cluster, session.route.peers[1]))
                assert 7.0 <= asyncio.get_running_loop().time() - begin < 8.0
                assert await feed(session, TAIL, keep=40) == EXPECTED[300:]
                assert session.failovers == 1

    run(main())


def test_sessions_of_many_clients_move_at_once_and_leave_nothing_behind() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async def one(number: int) -> None:
            prompt = rows(50 + number, start=number + 1)
            expected = reference(12, prompt + TAIL)
            async with client.session(200) as session:
                assert await feed(session, prompt) == [expected[len(prompt) - 1]]
                for index, row in enumerate(TAIL):
                    assert await feed(session, [row]) == [expected[len(prompt) + index]]
                assert session.failovers == 0

        tasks = [asyncio.create_task(one(number)) for number in range(12)]
        await asyncio.sleep(1.0)
        await cluster.stop("b1")
        await asyncio.gather(*tasks)
        for peer in cluster.peers.values():
            await asyncio.wait_for(peer.handler.wait_until_idle(), 1)
            assert peer.engine.scheduler.kv_free_tokens == peer.engine.scheduler.kv_tokens

    in_swarm(TWICE, scenario)
