"""What every `Network` promises of the registry: values under topics, each with an owner and a lease."""

import asyncio

import pytest

from llmasos.config import MAX_LEASE_S, MAX_RECORD_BYTES
from llmasos.errors import UsageError
from llmasos.network import Network
from tests.contract.worlds import (
    Play,
    World,
    eventually,
    pattern,
)


def test_an_unknown_topic_is_empty(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert await world.a.lookup(world.topic) == {}

    play(scenario)


def test_what_one_publishes_all_find_under_its_name(play: Play) -> None:
    async def scenario(world: World) -> None:
        before = world.a.now()
        assert await world.a.publish(world.topic, b"\x00first\xff", 20)
        for reader in (world.a, world.b):
            found = await reader.lookup(world.topic)
            assert list(found) == [world.a.peer_id]
            entry = found[world.a.peer_id]
            assert (entry.peer, entry.value) == (world.a.peer_id, b"\x00first\xff")
            assert before + 20 <= entry.expires_at <= world.a.now() + 20
        assert await world.a.lookup(world.topic + "?") == {}

    play(scenario)


def test_a_later_value_replaces_the_earlier_even_with_a_shorter_lease(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert await world.a.publish(world.topic, b"online", 60)
        assert (await world.b.lookup(world.topic))[world.a.peer_id].value == b"online"
        assert await world.a.publish(world.topic, b"offline", 20)
        assert (await world.b.lookup(world.topic))[world.a.peer_id].value == b"offline"

    play(scenario)


def test_a_value_is_gone_when_its_lease_ends(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert await world.a.publish(world.topic, b"short", 1.0)
        assert await world.b.publish(world.topic, b"long", 30.0)
        published_at = world.b.now()
        assert len(await world.b.lookup(world.topic)) == 2

        async def only_the_long_one() -> bool:
            return list(await world.b.lookup(world.topic)) == [world.b.peer_id]

        await eventually(only_the_long_one, within_s=3)
        assert world.b.now() - published_at > 0.9

    play(scenario)


def test_every_peer_has_its_place_under_one_topic(play: Play) -> None:
    async def scenario(world: World) -> None:
        networks: list[Network] = [world.a, world.b, *[await world.network() for _ in range(4)]]
        async with asyncio.TaskGroup() as group:
            for number, network in enumerate(networks):
                group.create_task(network.publish(world.topic, bytes([number]), 20))
        for reader in networks:
            found = await reader.lookup(world.topic)
            assert {peer: entry.value for peer, entry in found.items()} == {
                network.peer_id: bytes([number]) for number, network in enumerate(networks)
            }

    play(scenario)


def test_a_record_of_the_largest_size_fits(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert await world.a.publish(world.topic, pattern(MAX_RECORD_BYTES), MAX_LEASE_S)
        assert (await world.b.lookup(world.topic))[world.a.peer_id].value == pattern(MAX_RECORD_BYTES)

    play(scenario)


def test_what_no_registry_would_take_is_a_usage_error(play: Play) -> None:
    async def scenario(world: World) -> None:
        for topic, value, lease_s in (
            ("", b"x", 1.0),
            ("t" * 300, b"x", 1.0),
            ("t", bytes(MAX_RECORD_BYTES + 1), 1.0),
            ("t", b"x", MAX_LEASE_S + 1),
            ("t", b"x", 0.0),
            ("t", b"x", float("nan")),
        ):
            with pytest.raises(UsageError):
                await world.a.publish(topic, value, lease_s)

    play(scenario)
