"""What a client learns of peers from its own steps, in a swarm whose links and speeds are known."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from llmasos.network import PeerId
from llmasos.routing.planner import Hop
from llmasos.span import Span
from sim.loop import run
from sim.network import SimSwarm, peer_of
from sim.runner import SimRunner
from sim.stream import Link
from sim.swarm import CPU_SPEED, SimClient, SimCluster, SimModel
from tests.swarm.test_session import feed, rows

FAR_MS = {("client", "a"): 10, ("client", "b"): 60, ("a", "b"): 65}
"""One way. The link between the peers is longer than the mean of the client's own, which is what is guessed of it."""


def links(source: PeerId, target: PeerId) -> Link:
    ends = {peer_of(one): one for one in ("client", "a", "b")}
    pair = sorted((ends[source], ends[target]), key=["client", "a", "b"].index)
    return Link(latency_s=FAR_MS[pair[0], pair[1]] / 1e3, bytes_per_s=1e12)


def in_swarm(scenario: Callable[[SimCluster, SimClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=7, links=links), SimModel(blocks=12)) as cluster:
            await cluster.start("a", "0:5")
            await cluster.start("b", "5:12")
            async with cluster.client("client") as client:
                await scenario(cluster, client)

    run(main())


def block_s(client: SimClient, name: str) -> float:
    seen = client.router.health.observed(peer_of(name), client.network.now())
    assert seen.proven
    return seen.block_s


def test_a_long_link_is_not_taken_for_a_slow_peer() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await feed(session, rows(20))
            for row in rows(20):
                await feed(session, [row])
        assert block_s(client, "a") == pytest.approx(CPU_SPEED.first_row_s, rel=0.02)
        assert block_s(client, "b") == pytest.approx(CPU_SPEED.first_row_s, rel=0.02)

    in_swarm(scenario)


def test_the_hop_that_has_become_slow_is_told_from_the_others() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        runner = cluster.peers["b"].runner
        assert isinstance(runner, SimRunner)
        runner.slowdown = 10.0  # its record goes on saying what it was
        async with client.session() as session:
            await feed(session, rows(20))
            for row in rows(20):
                await feed(session, [row])
        assert block_s(client, "a") == pytest.approx(CPU_SPEED.first_row_s, rel=0.02)
        assert block_s(client, "b") == pytest.approx(10 * CPU_SPEED.first_row_s, rel=0.02)

    in_swarm(scenario)


def test_what_nobody_admits_is_charged_to_all() -> None:
    """The links explain 10 + 70 + 60 ms at most; a hop that hides 600 ms is found in the company that it keeps."""

    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await asyncio.sleep(1)  # pongs are back: the distances are known
            hops = session.route.hops
            for _ in range(30):
                client.router.saw_step(hops, 0.740, [(0, 5_000), (0, 0)])
        assert block_s(client, "a") == pytest.approx((0.005 + 0.595 * 5 / 12) / 5, rel=0.02)
        assert block_s(client, "b") == pytest.approx(0.595 / 12, rel=0.02)

    in_swarm(scenario)


def test_more_than_the_whole_step_is_no_hops_share() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        hops = [Hop(peer_of("a"), Span(0, 5)), Hop(peer_of("b"), Span(5, 12))]
        for _ in range(30):
            client.router.saw_step(hops, 0.1, [(10**9, 0), (0, 7_000)])
        assert block_s(client, "a") == pytest.approx(0.1 / 5)
        assert block_s(client, "b") == pytest.approx(0.001)

    in_swarm(scenario)
