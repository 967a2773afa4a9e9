"""Injected links in virtual time: what latency and bandwidth do to frames. The rest is in the network's contract."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from llmasos.errors import UsageError
from llmasos.network import Stream
from sim.links import LinkedNetwork, LinkPlan, Links, parse_bandwidth, parse_latency
from sim.loop import run
from sim.network import SimSwarm, peer_of
from sim.stream import LOOPBACK, Link

PROTOCOL = "links/1"
TICK_S = 1e-3
"""What the simulated network below takes by itself is less."""


def play(links: dict[frozenset[str], Link], scenario: Callable[..., Awaitable[None]]) -> None:
    """`scenario(a, b, c)`, three members behind links of which `links` names some."""

    async def main() -> None:
        swarm = SimSwarm(links=lambda source, target: LOOPBACK, lookup_s=0.0)
        ids = {name: peer_of(name) for name in "abc"}
        plan = LinkPlan(Link(latency_s=0.05, bytes_per_s=1e6), links)
        now = asyncio.get_running_loop().time
        await scenario(*(LinkedNetwork(swarm.network(name), plan.links_of(name, ids), now) for name in ids))

    run(main())


async def open_pair(source: LinkedNetwork, target: LinkedNetwork) -> tuple[Stream, Stream]:
    accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def hand_out(stream: Stream) -> None:
        accepted.put_nowait(stream)
        await asyncio.Event().wait()

    target.serve(PROTOCOL, hand_out)
    ours = await source.connect(target.contact, PROTOCOL)
    return ours, await accepted.get()


def seconds_since(begin: float) -> float:
    return asyncio.get_running_loop().time() - begin


def test_a_frame_takes_the_latency_of_its_pair_and_its_size_over_the_bandwidth() -> None:
    async def scenario(a: LinkedNetwork, b: LinkedNetwork, c: LinkedNetwork) -> None:
        for target, expected_s in ((b, 0.05 + 0.03), (c, 0.08 + 0.03 / 5)):
            ours, theirs = await open_pair(a, target)
            for sender, receiver in ((ours, theirs), (theirs, ours)):
                begin = asyncio.get_running_loop().time()
                await sender.send(bytes(30_000))
                await receiver.receive()
                assert seconds_since(begin) == pytest.approx(expected_s, abs=TICK_S)

    play({frozenset("ac"): Link(0.08, 5e6)}, scenario)


def test_latency_delays_but_does_not_limit_what_gets_through() -> None:
    async def scenario(a: LinkedNetwork, b: LinkedNetwork, c: LinkedNetwork) -> None:
        ours, theirs = await open_pair(a, b)
        begin = asyncio.get_running_loop().time()

        async def send_all() -> None:
            for _ in range(400):
                await ours.send(bytes(100_000))

        async with asyncio.TaskGroup() as group:
            group.create_task(send_all())
            for _ in range(400):
                await theirs.receive()
        assert seconds_since(begin) == pytest.approx(2.0 + 40e6 / 50e6, abs=0.01)

    play({frozenset("ab"): Link(2.0, 50e6)}, scenario)


def test_the_streams_of_a_pair_share_its_bandwidth_and_those_of_others_do_not() -> None:
    async def scenario(a: LinkedNetwork, b: LinkedNetwork, c: LinkedNetwork) -> None:
        pairs = [await open_pair(a, b), await open_pair(a, b), await open_pair(a, c)]
        begin = asyncio.get_running_loop().time()
        taken = []

        async def receive(stream: Stream) -> None:
            await stream.receive()
            taken.append(seconds_since(begin))

        async with asyncio.TaskGroup() as group:
            for ours, theirs in pairs:
                group.create_task(receive(theirs))
                group.create_task(ours.send(bytes(200_000)))
        assert taken == pytest.approx([0.25, 0.25, 0.45], abs=TICK_S)

    play({}, scenario)


def test_a_small_frame_waits_behind_a_large_one_of_another_stream() -> None:
    async def scenario(a: LinkedNetwork, b: LinkedNetwork, c: LinkedNetwork) -> None:
        (bulk, _), (ping, answer) = await open_pair(a, b), await open_pair(a, b)
        begin = asyncio.get_running_loop().time()
        await bulk.send(bytes(500_000))
        await ping.send(b"ping")
        await answer.receive()
        assert seconds_since(begin) == pytest.approx(0.55, abs=TICK_S)

    play({}, scenario)


def test_a_stream_opens_in_one_round_trip_and_the_registry_answers_in_one() -> None:
    async def scenario(a: LinkedNetwork, b: LinkedNetwork, c: LinkedNetwork) -> None:
        b.serve(PROTOCOL, lambda stream: stream.send(b"welcome"))
        begin = asyncio.get_running_loop().time()
        stream = await a.connect(b.contact, PROTOCOL)
        assert seconds_since(begin) == pytest.approx(0.1, abs=TICK_S)
        assert await stream.receive() == b"welcome"  # it has come meanwhile
        assert seconds_since(begin) == pytest.approx(0.1, abs=TICK_S)
        assert await a.publish("topic", b"value", 5.0)
        assert seconds_since(begin) == pytest.approx(0.2, abs=TICK_S)

    play({}, scenario)


def test_what_was_sent_arrives_though_its_sender_is_killed() -> None:
    async def scenario(a: LinkedNetwork, b: LinkedNetwork, c: LinkedNetwork) -> None:
        ours, theirs = await open_pair(a, b)
        await ours.send(b"last words")
        await asyncio.sleep(TICK_S)
        await a.close()
        assert await theirs.receive() == b"last words"

    play({}, scenario)


def test_links_as_they_are_written() -> None:
    plan = LinkPlan.parse("50ms", "100mbit", ["peer1-peer2=80ms,20mbit", "client-peer1=2ms", "peer3-peer1=1gbit"])
    assert plan.default == Link(0.05, 12.5e6)
    assert plan.pairs == {
        frozenset(("peer1", "peer2")): Link(0.08, 2.5e6),
        frozenset(("client", "peer1")): Link(0.002, 12.5e6),
        frozenset(("peer1", "peer3")): Link(0.05, 125e6),
    }
    ids = {name: peer_of(name) for name in ("client", "peer1", "peer2", "peer3")}
    links = plan.links_of("peer2", ids)
    assert links.to(ids["peer1"]) == Link(0.08, 2.5e6)
    assert links.to(ids["client"]) == plan.default
    assert Links.from_json(links.to_json()) == links
    assert LinkPlan.parse(None, None, []).plain
    assert not plan.plain


def test_links_that_mean_nothing_are_refused() -> None:
    for text in ("50", "ms", "-5ms", "fast"):
        with pytest.raises(UsageError, match="is no latency"):
            parse_latency(text)
    for text in ("100", "0mbit", "100ms", "wide"):
        with pytest.raises(UsageError, match="is no bandwidth"):
            parse_bandwidth(text)
    for text in ("peer1=5ms", "peer1-peer1=5ms", "peer1-peer2", "peer1-peer2=", "-peer2=5ms", "a-b-c=5ms"):
        with pytest.raises(UsageError, match="which two"):
            LinkPlan.parse(None, None, [text])
    with pytest.raises(UsageError, match="there is no peer9") as caught:
        LinkPlan.parse(None, None, ["peer1-peer9=5ms"]).check(["peer1", "peer2"])
    assert caught.value.hint == "there are peer1, peer2, client"
    with pytest.raises(UsageError, match="no links"):
        Links.from_json('{"default": 3}')
