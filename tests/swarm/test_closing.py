"""A client that is closed while somebody still waits for it: he is told, and waits no longer."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch

from llmasos import LLMasOS, UsageError
from llmasos.blocks.ends import ModelEnds
from llmasos.blocks.registry import ModelSpec
from llmasos.blocks.tensors import from_torch
from llmasos.client.head import MAX_ROWS, SharedHead
from tests.swarm.conftest import torch_swarm

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWnobody"
PATIENCE_S = 20.0


def test_a_call_of_another_thread_ends_when_the_client_is_closed() -> None:
    client = LLMasOS(NOBODY)
    begun, ended = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    async def generation() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # a session takes its leave
            ended.set()

    def call() -> None:
        try:
            client.wait(generation())
        except BaseException as error:  # noqa: BLE001 - it is looked at below
            errors.append(error)

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    assert begun.wait(PATIENCE_S)
    client.close()
    caller.join(PATIENCE_S)
    assert not caller.is_alive()
    assert ended.is_set()
    assert [str(error) for error in errors] == ["the client was closed before the call was done"]
    assert isinstance(errors[0], UsageError)
    with pytest.raises(UsageError, match="the client is closed"):
        client.wait(generation())
    client.close()


def test_nothing_runs_on_behind_a_client_that_is_closed() -> None:
    left: list[str] = []

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            left.append("ended")

    async def begin() -> None:
        left.append("begun")
        tasks.append(asyncio.create_task(background()))
        await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []
    client = LLMasOS(NOBODY)
    client.wait(begin())
    client.close()
    assert left == ["begun", "ended"]


async def test_everybody_who_waits_for_a_head_without_a_thread_is_told() -> None:
    """Those of the batch, and those who do not fit into it."""
    thread = ThreadPoolExecutor(1)
    head = SharedHead(cast(ModelEnds, None), thread)
    thread.shutdown()
    rows = from_torch(torch.ones(MAX_ROWS // 2 + 1, 3))
    async with asyncio.timeout(PATIENCE_S):
        errors = await asyncio.gather(*(head.score(rows, lambda _: None) for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in errors] == ["cannot schedule new futures after shutdown"] * 3


async def test_the_ends_of_a_model_that_are_let_go_say_why_they_do_nothing(smollm2: ModelSpec) -> None:
    async with torch_swarm(smollm2, ["0:30"]) as (client, _):
        generator = await client.generator("smollm2")
        generator.close()
        with pytest.raises(UsageError, match="the client was closed before the text was whole"):
            await generator.encode("The world is")
