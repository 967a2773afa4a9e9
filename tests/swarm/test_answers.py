"""Answers that cannot be: whoever gives them is replaced, and no text learns of it."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch

from llmasos.blocks.registry import ModelSpec
from llmasos.blocks.tensors import from_torch
from llmasos.client.session import Session
from llmasos.peer.peer import Peer
from llmasos.peer.runner import Chunk, Fault
from llmasos.wire import Tensor
from sim.loop import run
from sim.network import SimSwarm
from sim.runner import from_numbers, reference, to_numbers
from sim.swarm import SimCluster, SimModel
from tests.swarm.conftest import torch_swarm

MODEL = SimModel(blocks=5)
NUMBERS = [3, 1, 4, 1, 5]
Run = Callable[[Sequence[Chunk]], Coroutine[Any, Any, list[Tensor | Fault]]]


def answer_with(peer: Peer, rows: Tensor) -> None:
    """Let a peer answer `rows`, whatever it is asked to compute."""

    async def run(chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        return [rows for _ in chunks]

    peer.runner.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "answer",
    [
        Tensor("float32", (1, 3), memoryview(bytes(12))),
        Tensor("float32", (1, 1), memoryview(bytes(4))),
        Tensor("bfloat16", (1, 2), memoryview(bytes(4))),
        from_numbers([2**63]),
    ],
    ids=["wide", "narrow", "of another dtype", "no number"],
)
def test_a_last_hop_that_answers_with_nonsense_is_replaced(answer: Tensor) -> None:
    def number(rows: Tensor) -> bool:
        return max(to_numbers(rows)) < 2**60

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=3), MODEL) as cluster:
            await cluster.start("first", "0:2")
            bad = await cluster.start("bad", "2:5")
            async with cluster.client("client") as client:
                request = MODEL.request(64)
                async with Session(client.network, client.router, request, client.config, sound=number) as session:
                    assert to_numbers(await session.forward(from_numbers(NUMBERS[:4]))) == reference(5, NUMBERS)[3:4]
                    good = await cluster.start("good", "2:5")
                    answer_with(cluster.peers["bad"], answer)
                    assert to_numbers(await session.forward(from_numbers(NUMBERS[4:]))) == reference(5, NUMBERS)[4:]
                    assert session.route.peers[-1] == good
                    assert client.router.health.observed(bad, client.network.now()).failures == pytest.approx(
                        1, abs=0.1
                    )  # a moment ago

    run(main())


async def test_a_text_goes_on_behind_an_answer_that_is_not_finite(smollm2: ModelSpec) -> None:
    async with torch_swarm(smollm2, ["0:11", "11:30", "11:30"]) as (client, peers):
        whole = await client.generate("The world is", max_new_tokens=12)
        assert whole.failovers == 0
        poisoned: list[Peer] = []

        def poison(peer: Peer, real: Run) -> Run:
            async def run(chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
                results = await real(chunks)
                if poisoned or chunks[0].position < 8:
                    return results
                poisoned.append(peer)
                return [from_torch(torch.full((1, smollm2.hidden_size), torch.nan)) for _ in chunks]

            return run

        for peer in peers[1:]:
            peer.runner.run = poison(peer, peer.runner.run)  # type: ignore[assignment,method-assign]
        again = await client.generate("The world is", max_new_tokens=12)
        assert len(poisoned) == 1
        assert (again.token_ids, again.failovers) == (whole.token_ids, 1)
