"""Whom chance and doubt send where: no herd, and no peer that is believed more than it deserves."""

from collections import Counter
from random import Random
from statistics import median

import pytest

from llmasos.routing.cost import PRIOR
from llmasos.routing.health import Health
from llmasos.routing.planner import plan
from llmasos.routing.view import SwarmView
from tests.routing.builders import NOW, a_record, a_request, a_view


def equals(peers: int) -> SwarmView:
    return a_view(*(a_record(f"peer{number}", "0:30", announced_at=NOW - 10) for number in range(peers)))


def test_a_hundred_sessions_of_one_client_spread_evenly() -> None:
    view, rng, health, chosen = equals(10), Random(1), Health(), Counter[str]()
    for number in range(100):
        (peer,) = plan(view, a_request(), NOW + number / 100, rng, health).peers
        health.opened(peer, str(number), 100, NOW + number / 100)
        chosen[peer] += 1
    assert max(chosen.values()) <= 1.5 * 10
    assert min(chosen.values()) >= 0.5 * 10


@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_clients_with_one_stale_view_do_not_herd(seed: int) -> None:
    """Each opens four sessions within ten seconds, and knows of no other client."""
    view, chosen = equals(10), Counter[str]()
    for client in range(100):
        rng, health = Random(1_000 * seed + client), Health()
        for number in range(4):
            (peer,) = plan(view, a_request(), NOW + number, rng, health).peers
            health.opened(peer, str(number), 100, NOW + number)
            chosen[peer] += 1
    assert max(chosen.values()) <= 1.5 * 40


def test_a_hundred_clients_with_one_session_each_spread_as_evenly_as_chance_can() -> None:
    """They cannot know of each other: the busiest of ten then has 15 or fewer in two windows of three, never 25."""
    busiest = []
    for window in range(25):
        chosen = Counter(plan(equals(10), a_request(), NOW, Random(f"{window} {n}")).peers[0] for n in range(100))
        busiest.append(max(chosen.values()))
    assert median(busiest) <= 1.5 * 10
    assert max(busiest) < 2.5 * 10


def test_equal_peers_are_equally_likely() -> None:
    view, rng = equals(10), Random(5)
    chosen = Counter(plan(view, a_request(), NOW, rng).peers[0] for _ in range(2_000))
    assert max(chosen.values()) <= 1.25 * 200
    assert min(chosen.values()) >= 0.75 * 200


def test_a_peer_that_is_clearly_worse_is_left_alone() -> None:
    view = equals(9)
    view.add(a_record("slow", "0:30", block_seconds=0.01))
    assert all(plan(view, a_request(), NOW, Random(seed)).peers != ("slow",) for seed in range(200))


def test_a_hopeful_plan_tries_those_that_were_never_measured() -> None:
    view, health = equals(3), Health()
    health.saw_rtt("peer0", 0.002, NOW)
    assert all(plan(view, a_request(), NOW, Random(seed), health).peers == ("peer0",) for seed in range(50))
    hopeful = Counter(plan(view, a_request(), NOW, Random(seed), health, hopeful=True).peers[0] for seed in range(300))
    assert min(hopeful[f"peer{number}"] for number in range(3)) > 60


def test_a_hopeful_plan_tries_those_again_that_were_far_long_ago() -> None:
    view, health = a_view(*(a_record(f"peer{n}", "0:30", announced_at=NOW + 3_600) for n in range(2))), Health()
    health.saw_rtt("peer1", 0.2, NOW)  # by chance: a packet was lost
    health.saw_rtt("peer0", 0.002, NOW + 3_600)
    plans = [
        Counter(
            plan(view, a_request(), NOW + 3_600, Random(seed), health, hopeful=hopeful).peers for seed in range(200)
        )
        for hopeful in (False, True)
    ]
    assert plans[0][("peer0",)] == 200
    assert plans[1][("peer1",)] > 40


def test_where_hops_are_often_lost_a_route_of_fewer_is_taken() -> None:
    """Of two ways that take about as long, one over two fast peers."""
    view = a_view(
        a_record("whole", "0:30", block_seconds=0.0024, throughput=9.0),
        *(a_record(f"half{span}", span, block_seconds=0.0005) for span in ("0:15", "15:30")),
    )
    health = Health()
    for peer in ("whole", "half0:15", "half15:30"):
        health.saw_rtt(peer, 0.002, NOW)
    calm = plan(view, a_request(), NOW, Random(1), health, spread=0.0)
    assert len(calm.hops) == 2
    for number in range(40):
        health.lost(f"stranger{number}", NOW)
    assert plan(view, a_request(), NOW, Random(1), health, spread=0.0).peers == ("whole",)


def test_without_a_spread_the_cheapest_wins_always() -> None:
    view = equals(3)
    view.add(a_record("peer9", "0:30", block_seconds=0.00068, announced_at=NOW - 10))
    assert all(plan(view, a_request(), NOW, Random(seed), spread=0.0).peers == ("peer9",) for seed in range(50))


# --- trust -----------------------------------------------------------------------------------------------------------


def swarm_with_a_liar() -> SwarmView:
    view = a_view(*(a_record(f"peer{number}", "0:30", active_sessions=2) for number in range(9)))
    view.add(a_record("liar", "0:30", block_seconds=1e-6, row_seconds=1e-9, throughput=1e9))
    return view


def test_a_liar_cannot_capture_the_newcomers() -> None:
    view = swarm_with_a_liar()
    chosen = Counter(plan(view, a_request(), NOW, Random(seed)).peers[0] for seed in range(400))
    assert chosen["liar"] <= 0.65 * 400


def test_a_liar_is_found_out_by_its_first_session() -> None:
    view, health = swarm_with_a_liar(), Health()
    for step in range(60):
        health.saw_step("liar", 30, 30 * 0.02, NOW + step / 60)
    for number in range(9):
        for _ in range(int(PRIOR)):
            health.saw_step(f"peer{number}", 30, 30 * 0.0012, NOW)
    assert all(plan(view, a_request(), NOW + 1, Random(seed), health).peers != ("liar",) for seed in range(200))


def test_an_honest_fast_peer_is_used_always_once_it_is_known() -> None:
    view = a_view(*(a_record(f"peer{number}", "0:30") for number in range(9)))
    view.add(a_record("fast", "0:30", block_seconds=0.00002, row_seconds=0.000002))
    health = Health()
    for step in range(20):
        health.saw_step("fast", 30, 30 * 0.00002, NOW + step / 20)
        health.saw_rtt("fast", 0.02, NOW)
    assert all(plan(view, a_request(), NOW + 1, Random(seed), health).peers == ("fast",) for seed in range(200))


def test_the_cost_of_a_hop_explains_the_choice() -> None:
    view = swarm_with_a_liar()
    doubted = [
        hop.cost.doubt_s
        for seed in range(50)
        for hop in plan(view, a_request(), NOW, Random(seed)).hops
        if hop.peer == "liar"
    ]
    assert any(doubted)
    assert not all(doubted)
