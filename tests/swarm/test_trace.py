"""Where the time of a text went, in a swarm whose times are known: each row takes what the cost model says."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from llmasos.client.session import Session
from llmasos.client.trace import StepTime, Trace, Tracer, chrome_trace
from llmasos.network import PeerId
from sim.loop import run
from sim.network import Link, SimSwarm, peer_of
from sim.runner import from_numbers
from sim.swarm import CPU_SPEED, SimClient, SimCluster, SimModel

WAYS_MS = {("client", "a"): 30, ("a", "b"): 10, ("b", "client"): 50, ("client", "b"): 50, ("a", "client"): 30}
WAYS = {(peer_of(source), peer_of(target)): way_ms / 1e3 for (source, target), way_ms in WAYS_MS.items()}


def links(source: PeerId, target: PeerId) -> Link:
    return Link(latency_s=WAYS.get((source, target), 0.001), bytes_per_s=1e12)


def traced(client: SimClient) -> tuple[Session, Tracer]:
    request = client.model.request(1_024)
    session = Session(client.network, client.router, request, client.config, trace=True)
    assert session.tracer is not None
    return session, session.tracer


def in_swarm(scenario: Callable[[SimCluster, SimClient], Awaitable[None]], **spans: str) -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(seed=7, links=links), SimModel(blocks=12)) as cluster:
            for name, span in spans.items():
                await cluster.start(name, span)
            async with cluster.client("client") as client:
                await scenario(cluster, client)

    run(main())


def adds_up(trace: Trace) -> None:
    """Nothing is lost and nothing invented: each step is the sum of its hops, the whole is the sum of the steps."""
    for step in trace.steps:
        assert step.total_ms == pytest.approx(sum(hop.queue_ms + hop.compute_ms + hop.network_ms for hop in step.hops))
    assert trace.total_ms == pytest.approx(sum(step.total_ms for step in trace.steps))
    assert trace.total_ms == pytest.approx(sum(hop.queue_ms + hop.compute_ms + hop.network_ms for hop in trace.hops))


def test_each_hop_tells_what_it_computed_and_the_rest_is_the_network() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        session, tracer = traced(client)
        async with session:
            await asyncio.sleep(1)  # pongs are back: the distances are known
            for row in range(3):
                await session.forward(from_numbers([row]))
            trace = tracer.trace()
        adds_up(trace)
        assert [(step.position, step.tokens) for step in trace.steps] == [(0, 1), (1, 1), (2, 1)]
        for step in trace.steps:
            first, last = step.hops
            assert (first.peer, first.blocks, last.peer, last.blocks) == (peer_of("a"), "0:5", peer_of("b"), "5:12")
            assert first.compute_ms == pytest.approx(5e3 * CPU_SPEED.first_row_s, abs=0.01)
            assert last.compute_ms == pytest.approx(7e3 * CPU_SPEED.first_row_s, abs=0.01)
            assert first.queue_ms == last.queue_ms == pytest.approx(0, abs=0.01)
            assert first.network_ms + last.network_ms == pytest.approx(30 + 10 + 50, abs=0.1)
            assert last.network_ms > first.network_ms  # it has the way back as well

    in_swarm(scenario, a="0:5", b="5:12")


def test_waiting_for_the_pass_of_another_session_is_queue() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        (one, tracer), other = traced(client), client.session()
        async with one, other:
            busy = asyncio.create_task(other.forward(from_numbers(range(100))))
            await asyncio.sleep(0.04)  # its rows have arrived, and are being computed
            await one.forward(from_numbers([5]))
            await busy
        pass_ms = 12e3 * (CPU_SPEED.first_row_s + 99 * CPU_SPEED.row_s)
        (step,) = tracer.trace().steps
        adds_up(tracer.trace())
        assert step.hops[0].queue_ms == pytest.approx(pass_ms - 40, abs=1)
        assert step.hops[0].compute_ms == pytest.approx(12e3 * CPU_SPEED.first_row_s, abs=0.01)

    in_swarm(scenario, a="0:12")


def test_a_relayed_step_has_the_times_of_all_hops() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        session, tracer = traced(client)
        async with session:
            await session.forward(from_numbers([1]))
            cluster.world.partition(*session.route.peers)
            await session.forward(from_numbers([2]))
            tracer.begin()
            await session.forward(from_numbers([3]))
            (step,) = tracer.trace().steps
        adds_up(tracer.trace())
        assert [hop.compute_ms for hop in step.hops] == pytest.approx([7.5, 10.5], abs=0.01)
        assert sum(hop.network_ms for hop in step.hops) == pytest.approx(2 * 30 + 2 * 50, abs=0.1)

    in_swarm(scenario, a="0:5", b="5:12")


def test_after_a_failover_the_new_peer_is_in_the_trace() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        session, tracer = traced(client)
        async with session:
            await session.forward(from_numbers([1]))
            lost = session.route.peers[0]
            cluster.kill(next(name for name in ("a", "b") if peer_of(name) == lost))
            await session.forward(from_numbers([2]))
        trace = tracer.trace()
        adds_up(trace)
        assert {hop.peer for hop in trace.hops} == {peer_of("a"), peer_of("b")}
        assert [step.position for step in trace.steps] == [0, 1]  # what was only replayed is no step of the text

    in_swarm(scenario, a="0:12", b="0:12")


def test_a_session_that_is_not_traced_takes_nothing_down() -> None:
    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        async with client.session() as session:
            await session.forward(from_numbers([1]))
            assert session.tracer is None

    in_swarm(scenario, a="0:12")


def test_the_chrome_trace_has_each_step_on_each_hop_and_no_gap() -> None:
    traces: list[Trace] = []

    async def scenario(cluster: SimCluster, client: SimClient) -> None:
        session, tracer = traced(client)
        async with session:
            await session.forward(from_numbers(range(300)))  # in chunks, several at once
            await session.forward(from_numbers([7]))
        traces.append(tracer.trace())

    in_swarm(scenario, a="0:5", b="5:12")
    (trace,) = traces
    adds_up(trace)
    shown = json.loads(json.dumps(chrome_trace(trace)))
    events = shown["traceEvents"]
    named = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named[1].startswith("0:5 on ")
    assert named[2].startswith("5:12 on ")
    assert {event["ph"] for event in events} == {"M", "b", "e"}
    for number, step in enumerate(trace.steps):
        ends(events, number, step)


def ends(events: list[dict[str, object]], number: int, step: StepTime) -> None:
    """The slices of a step lie end to end from its beginning to its end."""
    mine = [event for event in events if event.get("id") == number and event["pid"] != 0]
    times = [float(str(event["ts"])) for event in mine]
    assert len(times) == 2 * 3 * len(step.hops)
    assert times == sorted(times)
    assert times[0] == pytest.approx(1e3 * step.begin_ms, abs=0.2)
    assert times[-1] == pytest.approx(1e3 * (step.begin_ms + step.total_ms), abs=0.5)
