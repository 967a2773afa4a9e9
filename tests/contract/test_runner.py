"""One contract, both sides of the Runner seam: a tiny checkpoint, run by torch and by the compiled kernels, and the
simulator's arithmetic."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from llmasos.blocks import native
from llmasos.blocks.layers import load_blocks
from llmasos.blocks.registry import resolve
from llmasos.blocks.tensors import from_torch, to_torch
from llmasos.peer.runner import Chunk, Fault, Runner, Speed
from llmasos.peer.torch_runner import TorchRunner
from llmasos.span import Span
from llmasos.wire import Tensor
from sim.runner import NUMBERS, SimRunner, from_numbers
from tests.checkpoints import make_checkpoint

SPAN = Span(1, 4)


@dataclass(frozen=True)
class Side:
    runner: Runner
    rows: Callable[[int, int], Tensor]  # (count, seed)
    poison: Tensor  # right in shape and dtype, impossible in content
    close: Callable[[Tensor, Tensor], bool]


def _torch_rows(hidden: int) -> Callable[[int, int], Tensor]:
    return lambda count, seed: from_torch(torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)))


def _sim_rows(count: int, seed: int) -> Tensor:
    return from_numbers([(seed * 7_919 + index * 104_729) % NUMBERS for index in range(count)])


@pytest.fixture(params=["torch", "native", "sim"])
async def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Side]:
    if request.param == "sim":
        runner: Runner = SimRunner(SPAN, Speed(1e-4, 1e-5))
        yield Side(runner, _sim_rows, from_numbers([NUMBERS + 5]), lambda a, b: a.data == b.data)
    else:
        if request.param == "native" and not native.available():
            pytest.skip(native.why_not())
        folder: Path = tmp_path_factory.mktemp("checkpoint")
        spec = resolve(str(make_checkpoint(folder, "llama")))
        runner = TorchRunner(load_blocks(spec, SPAN, engine=request.param))
        poison = from_torch(torch.full((1, spec.hidden_size), float("nan")))
        yield Side(
            runner,
            _torch_rows(spec.hidden_size),
            poison,
            lambda a, b: torch.allclose(to_torch(a), to_torch(b), atol=1e-5, rtol=1e-4),
        )
    await runner.close()


async def run(side: Side, session: str, position: int, rows: Tensor, span: Span = SPAN) -> Tensor:
    (result,) = await side.runner.run([Chunk(session, span, position, rows)])
    assert isinstance(result, Tensor)
    assert result.shape == rows.shape
    assert result.dtype == side.runner.dtype
    return result


async def test_what_it_holds_is_what_it_says(side: Side) -> None:
    assert side.runner.span == SPAN
    assert side.rows(1, 0).hidden == side.runner.hidden_size
    speed = await side.runner.measure()
    assert speed.first_row_s > 0
    assert speed.row_s > 0
    assert speed.throughput(3) > speed.throughput(6)


async def test_however_rows_are_cut_they_come_out_the_same(side: Side) -> None:
    rows = side.rows(23, 1)
    whole = await run(side, "whole", 0, rows)
    for cuts in ([0, 9, 10, 23], [0, 1, 2, 3, 23]):
        name = str(cuts)
        for start, end in pairwise(cuts):
            assert side.close(await run(side, name, start, rows.rows(start, end)), whole.rows(start, end))


async def test_blocks_compose(side: Side) -> None:
    rows = side.rows(11, 2)
    whole = await run(side, "whole", 0, rows)
    first = await run(side, "first", 0, rows, Span(1, 2))
    assert side.close(await run(side, "second", 0, first, Span(2, 4)), whole)


async def test_sessions_share_a_pass_without_touching(side: Side) -> None:
    a, b, c = side.rows(9, 3), side.rows(5, 4), side.rows(7, 5)
    alone = [await run(side, f"alone {n}", 0, rows) for n, rows in enumerate((a, b, c))]
    await run(side, "b", 0, b.rows(0, 4))
    together = await side.runner.run(
        [Chunk("a", SPAN, 0, a), Chunk("b", SPAN, 4, b.rows(4, 5)), Chunk("c", Span(2, 3), 0, c)]
    )
    assert all(isinstance(result, Tensor) for result in together)
    assert side.close(together[0], alone[0])  # type: ignore[arg-type]
    assert side.close(together[1], alone[1].rows(4, 5))  # type: ignore[arg-type]
    assert not side.close(together[2], alone[2])  # type: ignore[arg-type]  # it took one block of three


async def test_a_lower_position_rolls_back(side: Side) -> None:
    rows, other = side.rows(12, 6), side.rows(6, 7)
    whole = await run(side, "s", 0, rows)
    await run(side, "s", 4, other)
    assert side.close(await run(side, "s", 4, rows.rows(4, 12)), whole.rows(4, 12))


async def test_zero_rows(side: Side) -> None:
    assert (await run(side, "s", 0, side.rows(0, 8))).tokens == 0


async def test_a_fault_is_the_senders_and_stays_with_its_session(side: Side) -> None:
    good = side.rows(6, 9)
    whole = await run(side, "reference", 0, good)
    await run(side, "bad", 0, good.rows(0, 3))
    narrow = Tensor("float32", (1, 1), memoryview(bytes(4)))
    half = Tensor("bfloat16", (1, good.hidden), memoryview(bytes(2 * good.hidden)))
    for wrong in (side.poison, narrow, half):
        fault, fine = await side.runner.run([Chunk("bad", SPAN, 3, wrong), Chunk(f"{id(wrong)}", SPAN, 0, good)])
        assert isinstance(fault, Fault)
        assert fault.sender
        assert isinstance(fine, Tensor)
        assert side.close(fine, whole)
    (gap,) = await side.runner.run([Chunk("bad", SPAN, 5, good.rows(5, 6))])
    assert isinstance(gap, Fault)
    assert gap.sender
    assert side.close(await run(side, "bad", 3, good.rows(3, 6)), whole.rows(3, 6))


async def test_a_released_session_begins_anew(side: Side) -> None:
    rows = side.rows(5, 10)
    first = await run(side, "s", 0, rows)
    side.runner.release("s")
    side.runner.release("s")
    (gap,) = await side.runner.run([Chunk("s", SPAN, 5, rows.rows(0, 1))])
    assert isinstance(gap, Fault)
    assert side.close(await run(side, "s", 0, rows), first)


async def test_the_loop_stays_free_while_it_computes(side: Side) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(tick())
    await run(side, "s", 0, side.rows(64, 11))
    ticker.cancel()
    assert ticks > 1


async def test_a_fork_goes_on_by_itself(side: Side) -> None:
    rows = side.rows(200, 12)
    whole = await run(side, "whole", 0, rows)
    await run(side, "s", 0, rows.rows(0, 150))
    side.runner.fork("s", "fork", 128)
    other = side.rows(60, 13)
    await run(side, "s", 70, other)  # the source is cut back into what is shared, and goes another way
    assert side.close(await run(side, "fork", 128, rows.rows(128, 200)), whole.rows(128, 200))
    assert side.close(await run(side, "fork", 100, rows.rows(100, 200)), whole.rows(100, 200))
    side.runner.release("fork")
    again = await run(side, "beside", 0, rows.rows(0, 70))
    assert side.close(again, whole.rows(0, 70))
    assert side.close(await run(side, "beside", 70, other), await run(side, "s", 70, other))
