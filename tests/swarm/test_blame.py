"""Peers that say that the rows which they were sent are wrong: those of the client, or those of the hop before them."""

from collections.abc import Sequence

import pytest

from llmasos.errors import MissingBlocksError, UsageError
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


NUMBERS = [3, 1, 4, 1, 5]
WIDE = Tensor("float32", (1, 3), memoryview(bytes(12)))


def spoil(cluster: SimCluster, name: str, rows: Tensor) -> None:
    """Let a peer send `rows` from now on, whatever it is asked to compute."""

    async def run(chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        return [rows for _ in chunks]

    cluster.peers[name].runner.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("rows", [from_numbers([2**63]), WIDE], ids=["no number", "too wide"])
@pytest.mark.parametrize("successors", [1, 3])
def test_a_middle_hop_that_sends_nonsense_is_replaced(rows: Tensor, successors: int) -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            await cluster.start("first", "0:2")
            bad = await cluster.start("bad", "2:3")
            for number in range(successors):
                await cluster.start(f"last{number}", "3:6")
            async with cluster.client("client") as client, client.session(64) as session:
                assert to_numbers(await session.forward(from_numbers(NUMBERS[:4]))) == reference(6, NUMBERS)[3:4]
                await cluster.start("good", "2:3")
                spoil(cluster, "bad", rows)
                assert to_numbers(await session.forward(from_numbers(NUMBERS[4:]))) == reference(6, NUMBERS)[4:]
                assert bad not in session.route.peers
                assert client.router.health.observed(bad, client.network.now()).failures == pytest.approx(
                    1, abs=0.1
                )  # a moment ago

    run(main())


def test_rows_of_a_bad_hop_are_never_our_mistake() -> None:
    """There is nobody in its place: the swarm is short of blocks, the request is not wrong."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            for name, span in (("first", "0:2"), ("bad", "2:3"), ("last0", "3:6"), ("last1", "3:6")):
                await cluster.start(name, span)
            spoil(cluster, "bad", WIDE)
            async with cluster.client("client") as client, client.session(64) as session:
                with pytest.raises(MissingBlocksError, match="2:3: 1 failed a moment ago"):
                    await session.forward(from_numbers(NUMBERS[:1]))

    run(main())


def test_peers_that_lie_about_the_rows_of_another_are_replaced_both() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            await cluster.start("first", "0:3")
            liars = {await cluster.start(name, "3:6") for name in ("liar0", "liar1")}
            async with cluster.client("client") as client, client.session(64) as session:
                assert to_numbers(await session.forward(from_numbers(NUMBERS[:4]))) == reference(6, NUMBERS)[3:4]
                lie(cluster, "liar0")
                lie(cluster, "liar1")
                honest = await cluster.start("honest", "3:6")
                assert to_numbers(await session.forward(from_numbers(NUMBERS[4:]))) == reference(6, NUMBERS)[4:]
                assert session.route.peers[-1] == honest not in liars

    run(main())


def test_who_cannot_replay_speaks_for_himself_alone() -> None:
    """A hop that has lost what it sent refuses the request to send it again: nobody else had a part in that."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=2), MODEL) as cluster:
            first = await cluster.start("first", "0:2")
            second = await cluster.start("second", "2:4")
            await cluster.start("last", "4:6")
            async with cluster.client("client") as client, client.session(64) as session:
                assert to_numbers(await session.forward(from_numbers(NUMBERS[:4]))) == reference(6, NUMBERS)[3:4]
                [forgetful] = cluster.peers["second"].handler._sessions.values()
                forgetful._outputs.cut(1)
                cluster.kill("last")
                await cluster.start("next", "4:6")
                await cluster.start("other", "2:4")
                assert to_numbers(await session.forward(from_numbers(NUMBERS[4:]))) == reference(6, NUMBERS)[4:]
                failures = [
                    client.router.health.observed(peer, client.network.now()).failures for peer in (first, second)
                ]
                assert failures == [0, pytest.approx(1, abs=0.1)]

    run(main())
