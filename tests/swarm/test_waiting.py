"""How long a text waits for blocks that nobody has: one deadline, whatever is tried meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from llmasos.client.events import Event, Waiting
from llmasos.client.session import Session
from llmasos.config import ClientConfig
from llmasos.errors import MissingBlocksError
from sim.loop import run
from sim.network import SimSwarm
from sim.runner import from_numbers
from sim.swarm import SimCluster, SimModel

ROWS, NEXT = from_numbers(list(range(1, 31))), from_numbers([77])
PROMISED_S = ClientConfig().wait_for_blocks_s


@asynccontextmanager
async def two_hops() -> AsyncIterator[tuple[SimCluster, Session]]:
    """A session through the peers `first` and `last`, which have all blocks between them."""
    async with SimCluster(SimSwarm(seed=5), SimModel(blocks=9)) as cluster:
        await cluster.start("first", "0:4")
        await cluster.start("last", "4:9")
        async with cluster.client("client") as client, client.session() as session:
            yield cluster, session


async def lose(cluster: SimCluster, name: str) -> None:
    """Kill a peer. Its record outlives it: sessions go on trying it until that has run out."""
    await asyncio.sleep(1)
    cluster.kill(name)


def test_a_lost_peer_that_is_tried_again_does_not_prolong_the_wait() -> None:
    async def main() -> None:
        told: list[Event] = []
        async with two_hops() as (cluster, session):
            session._on_event = told.append
            await session.forward(ROWS)
            await lose(cluster, "last")
            loop = asyncio.get_running_loop()
            begin = loop.time()
            with pytest.raises(MissingBlocksError):
                await session.forward(NEXT)
            assert PROMISED_S <= loop.time() - begin < PROMISED_S + 2
        left_s = [event.left_s for event in told if isinstance(event, Waiting)]
        assert len(left_s) == len(told) >= 20
        assert all(later < earlier for earlier, later in pairwise(left_s))

    run(main())


def test_each_loss_has_the_whole_time() -> None:
    async def main() -> None:
        async with two_hops() as (cluster, session):
            await session.forward(ROWS)
            for life in range(3):
                await lose(cluster, f"last{life or ''}")
                waiting = asyncio.create_task(session.forward(NEXT))
                await asyncio.sleep(PROMISED_S - 5)
                assert not waiting.done()
                await cluster.start(f"last{life + 1}", "4:9")
                await waiting
            assert session.failovers == 3

    run(main())


def test_who_stopped_waiting_may_wait_anew() -> None:
    async def main() -> None:
        async with two_hops() as (cluster, session):
            await session.forward(ROWS)
            await lose(cluster, "last")
            for _ in range(2):
                stopped = asyncio.create_task(session.forward(NEXT))
                await asyncio.sleep(PROMISED_S - 5)
                assert not stopped.done()
                stopped.cancel()
                await asyncio.wait([stopped])

    run(main())
