"""Faults that were once answered wrongly, or far too late. Each test is one of them."""

import asyncio

import pytest

from llmasos.config import MAX_PENDING_TOKENS, RECORDED_STEPS
from llmasos.peer.peer import Peer
from llmasos.peer.runner import Speed
from llmasos.wire import PROTOCOL, Failed, NextHop, Reroute, Result, Step, decode, encode
from sim import stream
from sim.loop import run
from sim.network import SimNetwork, SimSwarm
from sim.runner import reference, to_numbers
from sim.swarm import SimClient, SimCluster, SimModel
from tests.swarm.test_hostile import against_a_peer, ask, opened, step
from tests.swarm.test_session import feed, in_swarm, rows

TWICE = {"a1": "0:4", "a2": "0:4", "b1": "4:9", "b2": "4:9", "c1": "9:12", "c2": "9:12"}
PROMPT, TAIL = rows(900), rows(6, start=9)
EXPECTED = reference(12, PROMPT + TAIL)


async def seconds(work: asyncio.Task[list[int]]) -> float:
    begin = asyncio.get_running_loop().time()
    await work
    return asyncio.get_running_loop().time() - begin


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_hung_peer_that_takes_nothing_in_holds_nobody_up(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to it fills the transport; whoever sends - client or hop - waited 40 s for the keep-alive."""
    monkeypatch.setattr(stream, "WINDOW_BYTES", 2_500)

    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            work = asyncio.create_task(feed(session, PROMPT))
            await asyncio.sleep(0.3)
            cluster.world.hang(session.route.peers[position])
            assert await seconds(work) < 8
            assert work.result() == EXPECTED[899:900]
            assert session.failovers == 1

    in_swarm(TWICE, scenario)


def test_a_replacement_that_hangs_while_it_catches_up_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hop before it pushes the replay, and has to let go of that for the next replacement."""
    monkeypatch.setattr(stream, "WINDOW_BYTES", 2_500)

    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await feed(session, PROMPT)
            cluster.world.kill(session.route.peers[1])
            work = asyncio.create_task(feed(session, TAIL[:1]))
            await asyncio.sleep(0.1)
            cluster.world.hang(session.route.peers[1])
            assert await seconds(work) < 8
            assert work.result() == EXPECTED[900:901]

    in_swarm(TWICE | {"b3": "4:9"}, scenario)


@pytest.mark.parametrize("pair", [(0, 1), (1, 2)])
def test_two_hops_that_lose_sight_of_each_other_are_relayed(pair: tuple[int, int]) -> None:
    """Their stream stays open, and both answer the client: the step was waited for until it was given up after 30 s."""

    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await feed(session, PROMPT)
            await feed(session, TAIL[:1])
            cluster.world.partition(*(session.route.peers[index] for index in pair))
            work = asyncio.create_task(feed(session, TAIL[1:2]))
            assert await seconds(work) < 5
            assert work.result() == EXPECTED[901:902]
            assert await feed(session, TAIL[2:], keep=4) == EXPECTED[902:]
            assert session.failovers == 0

    in_swarm({"a": "0:4", "b": "4:9", "c": "9:12"}, scenario)


def test_a_prompt_longer_than_a_peer_queues_is_no_silence() -> None:
    """With its queue full the peer stopped reading, did not hear the pings behind it, and was taken for dead."""

    async def main() -> None:
        model = SimModel(blocks=3, context_tokens=3 * MAX_PENDING_TOKENS)
        async with SimCluster(SimSwarm(seed=7), model) as cluster:
            await cluster.start("slow", "0:3", speed=Speed(first_row_s=0.01, row_s=0.002))
            async with cluster.client("client") as client:
                prompt = rows(2 * MAX_PENDING_TOKENS + 100)
                async with client.session(len(prompt)) as session:
                    assert await feed(session, prompt) == reference(3, prompt)[-1:]
                    assert session.failovers == 0

    run(main())


def test_a_link_that_broke_once_stays_broken() -> None:
    """A step that came through behind one that did not left a hole in the next hop, which then blamed the client."""

    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        next_peer = stranger.swarm.network("next")
        streams: list[stream.SimStream] = []

        async def serve(link: stream.SimStream) -> None:
            streams.append(link)
            while True:
                await link.receive()

        next_peer.serve(PROTOCOL, serve)  # type: ignore[arg-type]
        session = await opened(stranger, peer, downstream=NextHop(next_peer.contact, "s"))
        await session.send(encode(step(0, 0, [1])))
        await asyncio.sleep(1)
        streams[0].shut("reset")
        await asyncio.sleep(1)
        for number in (1, 2, 3):
            answer = await ask(session, step(number, number, [1]))
            assert isinstance(answer, Failed)
            assert (answer.code, answer.step) == ("next_hop_lost", number)
        assert len(streams) == 1
        # told again where to go, it starts anew
        await session.send(encode(Reroute(downstream=NextHop(next_peer.contact, "s"))))
        await session.send(encode(step(4, 0, [7])))
        await asyncio.sleep(1)
        assert len(streams) == 2
        await session.close()
        await next_peer.close()

    against_a_peer(scenario)


def test_a_repeated_step_is_pushed_on_from_the_record() -> None:
    """At a hop in the middle it was dropped: whoever had lost it further on never got it."""

    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        next_peer = stranger.swarm.network("next")
        pushed: list[object] = []

        async def serve(link: stream.SimStream) -> None:
            while True:
                pushed.append(decode(await link.receive()))

        next_peer.serve(PROTOCOL, serve)  # type: ignore[arg-type]
        session = await opened(stranger, peer, downstream=NextHop(next_peer.contact, "s"))
        await session.send(encode(step(0, 0, [1, 2, 3])))
        await session.send(encode(step(1, 3, [4])))
        await asyncio.sleep(1)
        passes = peer.engine.passes
        for number in (0, 1, 0):
            await session.send(encode(step(number, 0, [9])))  # the same number: what it carries does not matter
        await asyncio.sleep(1)
        assert peer.engine.passes == passes
        steps = [message for message in pushed if isinstance(message, Step)]
        assert [(message.step, message.position) for message in steps] == [(0, 0), (1, 3), (0, 0), (1, 3), (0, 0)]
        assert to_numbers(steps[4].hidden) == reference(5, [1, 2, 3])
        await session.close()
        await next_peer.close()

    against_a_peer(scenario)


def test_what_a_session_keeps_of_its_steps_is_bounded() -> None:
    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        session = await opened(stranger, peer, tokens=50)
        for number in range(1_000):
            assert isinstance(await ask(session, step(number, 0, [number])), Result)
        (held,) = [held for held in peer.handler._sessions.values() if held._last_step == 999]
        assert len(held._record) == RECORDED_STEPS
        assert held._outputs.length == 1
        assert isinstance(await ask(session, step(999, 0, [5])), Result)
        await session.close()

    against_a_peer(scenario)


def test_who_does_not_read_its_answers_is_not_read_either() -> None:
    """Refusals piled up without a bound for a client that only sends."""

    async def scenario(stranger: SimNetwork, peer: Peer) -> None:
        session = await opened(stranger, peer, tokens=50)

        async def flood() -> None:
            for number in range(200_000):
                await session.send(encode(step(number, 40, [1])))  # leaves a hole: refused

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(1)
        (held,) = [held for held in peer.handler._sessions.values() if held._last_step > 100]
        assert held._answers.rows <= MAX_PENDING_TOKENS + 1
        assert not flooding.done()
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        await session.close()

    against_a_peer(scenario)


def test_a_last_hop_that_claims_to_have_a_next_one() -> None:
    """The client looked for the hop behind the last, and fell over."""

    async def main() -> None:
        async with SimCluster(SimSwarm(seed=7), SimModel(blocks=3)) as cluster:
            await cluster.start("liar", "0:3")
            await cluster.start("honest", "0:3")
            async with cluster.client("client", seed=1) as client, client.session() as session:
                await feed(session, [1, 2])
                first = session.route.peers[0]
                (liar,) = [peer for peer in cluster.peers.values() if peer.network.peer_id == first]
                (held,) = liar.handler._sessions.values()
                liar.engine.abandon(held.key)
                held.accept = lambda step: lie(held, step)  # type: ignore[method-assign]
                assert await feed(session, [3]) == reference(3, [1, 2, 3])[2:]

    async def lie(held: object, step: Step) -> None:
        held.tell(Failed(code="next_hop_lost", message="gone", step=step.step))  # type: ignore[attr-defined]

    run(main())
