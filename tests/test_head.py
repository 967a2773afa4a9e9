"""The head that generations share: who is scored together, and that nobody is scored as somebody else."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch

from llmasos.blocks.ends import ModelEnds
from llmasos.blocks.tensors import from_torch
from llmasos.client.head import MAX_ROWS, SharedHead

HIDDEN = 3


class Doubling:
    """A head whose scores are its rows, doubled; a negative row is too much for it."""

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        if (rows < 0).any():
            raise RuntimeError("negative")
        return 2 * rows


@pytest.fixture
def head() -> Iterator[SharedHead]:
    with ThreadPoolExecutor(1) as thread:
        yield SharedHead(cast(ModelEnds, Doubling()), thread)


async def step(head: SharedHead, number: float, arrives_after_s: float = 0.0, rows: int = 1) -> torch.Tensor:
    """A generation's step: its rows arrive later, and are scored."""
    with head.expecting():
        await asyncio.sleep(arrives_after_s)
        return await head.score(from_torch(torch.full((rows, HIDDEN), float(number))), lambda scores: scores)


async def test_rows_that_come_one_after_the_other_are_scored_together(head: SharedHead) -> None:
    answers = await asyncio.gather(*(step(head, n, 0.0002 * n) for n in range(16)))
    for n, answer in enumerate(answers):
        assert torch.equal(answer, torch.full((1, HIDDEN), 2.0 * n))
    assert head.calls < 8


async def test_nobody_is_waited_for_long(head: SharedHead) -> None:
    late = asyncio.create_task(step(head, 2, 5.0))
    await asyncio.sleep(0)
    async with asyncio.timeout(1.0):
        assert torch.equal(await step(head, 1), torch.full((1, HIDDEN), 2.0))
    late.cancel()


async def test_no_call_has_more_rows_than_fit(head: SharedHead) -> None:
    answers = await asyncio.gather(*(step(head, n, rows=30) for n in range(5)))
    assert [len(answer) for answer in answers] == [30] * 5
    assert head.calls >= -(-150 // MAX_ROWS)


async def test_a_failure_is_told_and_the_head_goes_on(head: SharedHead) -> None:
    with pytest.raises(RuntimeError, match="negative"):
        await step(head, -1)
    assert torch.equal(await step(head, 3), torch.full((1, HIDDEN), 6.0))


async def test_what_one_makes_of_its_scores_concerns_nobody_else(head: SharedHead) -> None:
    def fail(scores: torch.Tensor) -> torch.Tensor:
        raise ValueError("cannot choose")

    rows = from_torch(torch.ones(1, HIDDEN))
    failed, total = await asyncio.gather(
        head.score(rows, fail), head.score(rows, lambda scores: float(scores.sum())), return_exceptions=True
    )
    assert isinstance(failed, ValueError)
    assert total == 2.0 * HIDDEN
    assert head.calls == 1


async def test_a_generation_that_was_given_up_is_passed_over(head: SharedHead) -> None:
    given_up = asyncio.create_task(step(head, 1))
    other = asyncio.create_task(step(head, 2, 0.0005))
    await asyncio.sleep(0)
    given_up.cancel()
    assert torch.equal(await other, torch.full((1, HIDDEN), 4.0))
