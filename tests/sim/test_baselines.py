"""Every policy covers the model; the bound is the maximum flow."""

import random

import networkx
import pytest

from llmasos.errors import UsageError
from llmasos.span import Span
from sim.baselines import POLICIES, flow_rows_per_s, make_policy
from sim.compare import compare
from sim.regions import Map, Place, rtt_s
from sim.scenario import load, resize
from sim.simulation import simulate


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["steady", "storm"])
def test_every_policy_serves_and_fails_over(name: str, policy: str) -> None:
    report = simulate(resize(load(name), peers=9, clients=3, duration_s=8), 2, policy=policy)
    assert report.violations == []
    assert report.done > 0
    assert report.hops >= 1


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no policy 'best'"):
        make_policy("best", Map(bytes_per_s=1, jitter=0, loss=0), "")


def test_a_comparison_says_where_ours_stands() -> None:
    scenario = resize(load("steady"), clients=3, duration_s=5)
    comparison = compare(scenario, [1], policies=("ours", "random"), processes=1)
    assert [report.policy for report in comparison.reports] == ["ours", "random"]
    assert [standing.measure for standing in comparison.standings()] == [
        "tokens_per_s",
        "first_token_p95_s",
        "token_p95_s",
    ]
    assert all(standing.ratio >= 1 for standing in comparison.standings())


def test_several_seeds_are_their_mean() -> None:
    scenario = resize(load("steady"), clients=3, duration_s=5)
    alone = [compare(scenario, [seed], policies=("random",), processes=1).reports[0] for seed in (4, 5)]
    [both] = compare(scenario, [4, 5], policies=("random",), processes=1).reports
    assert both.done == alone[0].done + alone[1].done
    assert both.tokens_per_s == pytest.approx((alone[0].tokens_per_s + alone[1].tokens_per_s) / 2)
    assert both.token.count == alone[0].token.count + alone[1].token.count
    assert min(one.token.p95_s for one in alone) <= both.token.p95_s <= max(one.token.p95_s for one in alone)


def maximum_flow(peers: list[tuple[Span, float]], blocks: int, rate: float) -> float:
    graph = networkx.DiGraph()
    for index, (span, capacity) in enumerate(peers):
        graph.add_edge("source", index, capacity=capacity)
        for block in span.blocks():
            graph.add_edge(index, f"block {block}", capacity=float("inf"))
    for block in range(blocks):
        graph.add_edge(f"block {block}", "sink", capacity=rate)
    flow: float = networkx.maximum_flow_value(graph, "source", "sink")
    return flow


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_the_maximum_flow(seed: int) -> None:
    rng = random.Random(seed)
    blocks = 7
    peers = []
    for _ in range(rng.randint(2, 9)):
        start = rng.randrange(blocks)
        peers.append((Span(start, rng.randint(start + 1, blocks)), float(rng.randint(1, 50))))
    peers.append((Span(0, blocks), 3.0))
    bound = flow_rows_per_s(peers, blocks)
    assert maximum_flow(peers, blocks, bound * 0.999) == pytest.approx(blocks * bound * 0.999, rel=1e-6)
    assert maximum_flow(peers, blocks, bound * 1.01) < blocks * bound * 1.01 * (1 - 1e-6)


def test_no_peers_no_flow() -> None:
    assert flow_rows_per_s([], 5) == 0.0
    assert flow_rows_per_s([(Span(0, 4), 9.0)], 5) == pytest.approx(0.0, abs=1e-6)


def test_distances() -> None:
    assert rtt_s(Place("us-east"), Place("eu-west")) == rtt_s(Place("eu-west"), Place("us-east")) == 0.07
    assert rtt_s(Place("us-east", relayed=True), Place("eu-west")) == pytest.approx(0.13)
    assert rtt_s(Place(), Place()) == 0.001
