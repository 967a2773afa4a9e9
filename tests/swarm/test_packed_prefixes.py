"""What a prompt begins with is shared packed, and only between routes that round in the same places."""

import asyncio
from collections.abc import Callable

import pytest

from llmasos.client.session import Session
from llmasos.config import Codec
from tests.swarm.chaotic import LOSSY, PAGES, SPLIT, Swarm, Trouble, in_swarm, lose, prompt, tensor, write, written


async def write_twice(swarm: Swarm, new_session: Callable[..., Session], trouble: dict[int, Trouble]) -> list[bytes]:
    """The same prompt in two sessions; the second one's answers."""
    async with new_session(PAGES) as session:
        await write(swarm, session)
    async with new_session(PAGES) as session:
        assert session.prefix_tokens == 64 * len(PAGES)
        session.begin_with(tensor(prompt()[: session.prefix_tokens]))
        return await write(swarm, session, trouble)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_failover_behind_a_shared_prefix_changes_no_bit(codec: Codec, lost: int) -> None:
    async def scenario(swarm: Swarm) -> list[bytes]:
        await swarm.start(*SPLIT)
        return await write_twice(swarm, await swarm.client(codec), {4: lose(lost, instead=[SPLIT[lost]])})

    assert in_swarm(scenario) == written(codec, *SPLIT)


def test_a_prefix_is_not_shared_between_routes_that_round_elsewhere() -> None:
    """The last peer holds what the first session computed: of other roundings than what the newcomers then hold."""

    async def scenario(swarm: Swarm) -> list[bytes]:
        await swarm.start("0:2", "2:6")
        new_session = await swarm.client("int8")
        async with new_session(PAGES) as session:
            await write(swarm, session)
            swarm.kill(session, 0)
        await swarm.start("0:1", "1:2")
        await asyncio.sleep(30)
        return await write_twice(swarm, new_session, {})

    assert in_swarm(scenario) == written("int8", "0:1", "1:2", "2:6")


def test_nor_is_what_was_named_before_the_route_was_known() -> None:
    """A hop hangs while the session is opened, and two come in its place: the prompt is named anew on the others."""

    async def scenario(swarm: Swarm) -> list[bytes]:
        await swarm.start("0:2", "2:6")
        new_session = await swarm.client("int8")
        async with new_session() as session:  # the client gets to know them, before there are others
            hanging = session.route.hops[0].peer
            await session.forward(tensor(prompt()))
        swarm.world.hang(hanging)
        await swarm.start("0:1", "1:2")
        async with new_session(PAGES) as session:
            assert len(session.route.hops) == 3
            await write(swarm, session)
            swarm.world.heal()
            swarm.kill(session, 0, 1)
        await asyncio.sleep(60)
        return await write_twice(swarm, new_session, {})

    assert in_swarm(scenario) == written("int8", "0:2", "2:6")
