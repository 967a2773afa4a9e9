"""Peers that say that the client's rows are wrong: one may lie, two are believed."""

from collections.abc import Sequence

import pytest

from llmasos.errors import UsageError
from llmasos.peer.runner import Chunk, Fault
from llmasos.wire import Tensor
from sim.loop import run
from sim.network import SimSwarm
from sim.runner import from_numbers, reference, to_numbers
from sim.swarm import SimCluster, SimModel

MODEL = SimModel(blocks=6)


def lie(cluster: SimCluster, name: str) -> None:
    """Let a peer refuse all rows from now on, and say that they are wrong."""

    async def refuse(chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        return [Fault("these rows are wrong", sender=True) for _ in chunks]

    cluster.peers[name].runner.run = refuse  # type: ignore[method-assign]


def test_a_peer_that_lies_about_the_rows_is_replaced() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            names = {await cluster.start(name, "0:6"): name for name in "ab"}
            numbers = [3, 1, 4, 1, 5]
            async with cluster.client("client") as client, client.session(64) as session:
                assert to_numbers(await session.forward(from_numbers(numbers[:3]))) == reference(6, numbers)[2:3]
                [liar] = session.route.peers
                lie(cluster, names[liar])
                assert to_numbers(await session.forward(from_numbers(numbers[3:]))) == reference(6, numbers)[4:]
                assert session.route.peers != (liar,)
                assert client.router.health.avoided_for(liar, client.network.now()) > 0

    run(main())


@pytest.mark.parametrize("peers", ["a", "ab", "abc"])
def test_two_peers_are_believed_and_one_if_there_is_no_other(peers: str) -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            for name in peers:
                await cluster.start(name, "0:6")
            async with cluster.client("client") as client, client.session(64) as session:
                wrong = from_numbers([2**64 - 1])  # no row of the simulated model
                with pytest.raises(UsageError, match="hold numbers that are none"):
                    await session.forward(wrong)
                assert session.failovers <= 1
                assert to_numbers(await session.forward(from_numbers([7, 8]))) == reference(6, [7, 8])[1:]

    run(main())
