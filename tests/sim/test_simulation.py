"""Whole runs: the shipped code, the same steps from the same seed, and judges that see what is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

import llmasos.client.router
import llmasos.client.scout
import llmasos.client.session
import llmasos.peer.announce
import llmasos.peer.engine
import llmasos.peer.handler
import llmasos.peer.peer
import llmasos.peer.resident
import llmasos.peer.scheduler
import llmasos.routing.health
import llmasos.routing.placement
import llmasos.routing.planner
import sim.auto
import sim.runner
import sim.swarm
from llmasos.wire import Tensor
from sim.baselines import make_policy
from sim.network import SimSwarm
from sim.regions import RELAY_RTT_S, Map
from sim.report import Report
from sim.scenario import Scenario, load, parse, resize
from sim.simulation import simulate
from sim.swarm import SimCluster, SimModel

ROOT = Path(__file__).parents[2]


def small(name: str = "steady", seconds: float = 12.0) -> Scenario:
    return resize(load(name), peers=9, clients=3, duration_s=seconds)


# --- it is the shipped code -----------------------------------------------------------------------------------------


def test_the_simulator_runs_the_shipped_modules() -> None:
    assert sim.swarm.Peer is llmasos.peer.peer.Peer
    assert sim.swarm.Session is llmasos.client.session.Session
    assert sim.swarm.Router is llmasos.client.router.Router
    assert llmasos.client.scout.plan is llmasos.routing.planner.plan
    assert sim.auto.choose_span is llmasos.routing.placement.choose_span
    assert sim.auto.Resident is llmasos.peer.resident.Resident
    assert make_policy("ours", Map(bytes_per_s=1, jitter=0, loss=0), "") is None  # the router's own


def test_what_runs_is_made_of_the_shipped_classes() -> None:
    async def main() -> None:
        async with SimCluster(SimSwarm(), SimModel(blocks=3)) as cluster:
            await cluster.start("peer", "0:3")
            peer = cluster.peers["peer"]
            async with cluster.client("client") as client, client.session() as session:
                for thing, shipped in (
                    (peer, llmasos.peer.peer.Peer),
                    (peer.handler, llmasos.peer.handler.Handler),
                    (peer.engine, llmasos.peer.engine.Engine),
                    (peer.engine.scheduler, llmasos.peer.scheduler.Scheduler),
                    (peer.announcer, llmasos.peer.announce.Announcer),
                    (session, llmasos.client.session.Session),
                    (client.router, llmasos.client.router.Router),
                    (client.router.health, llmasos.routing.health.Health),
                ):
                    assert type(thing) is shipped

    sim.swarm.__dict__  # noqa: B018 - loaded above
    from sim.loop import run

    run(main())


# --- one seed, one story --------------------------------------------------------------------------------------------


def test_the_same_seed_takes_the_same_steps_in_another_process() -> None:
    def run(seed: str, hash_seed: str) -> dict[str, object]:
        command = [sys.executable, "-m", "sim", "run", "storm", "--duration", "15", "--seed", seed, "--json"]
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        report: dict[str, object] = json.loads(done.stdout)
        del report["real_s"], report["cpu_s"], report["peak_mib"]
        return report

    first, again, other = run("3", "1"), run("3", "22"), run("4", "1")
    assert first == again
    assert first["trace"] != other["trace"]
    assert first["failovers"] != 0


def test_a_report_adds_up() -> None:
    report = simulate(small(), 5)
    assert report.violations == []
    assert report.requests == report.done > 5
    assert report.tokens == report.token.count + report.first_token.count
    assert report.tokens_per_s == pytest.approx(report.tokens / report.virtual_s)
    assert report.tokens_per_s < report.bound_tokens_per_s
    # Three hops of eight blocks at 1.5 ms, on machines between half and twice as fast
    assert 0.5 * 0.036 < report.token.p50_s < 2 * 0.036
    assert report.token.p50_s <= report.token.p95_s <= report.token.p99_s
    assert len(report.peers_used) == 9
    assert all(0 <= peer.utilisation <= 1 for peer in report.peers_used)
    assert [sample.at_s for sample in report.timeline] == sorted(sample.at_s for sample in report.timeline)
    assert all(sample.missing_blocks == 0 and sample.online == 9 for sample in report.timeline)
    json.dumps(report.as_dict(), allow_nan=False)


def test_to_be_refused_is_no_failover() -> None:
    crowded = load("flash-crowd")
    crowd = msgspec.structs.replace(crowded.crowds[0], at_s=1, for_s=8, clients=60)
    report = simulate(resize(msgspec.structs.replace(crowded, crowds=(crowd,)), peers=6, clients=2, duration_s=10), 3)
    assert report.refused > 0
    assert (report.failovers, report.violations) == (0, [])


# --- what goes wrong is seen ----------------------------------------------------------------------------------------


def problem_of(report: Report) -> str:
    assert len(report.violations) == 1
    assert "python -m sim run" in report.replay
    assert f"--seed {report.seed}" in report.replay
    return report.violations[0]


def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, rows_seen = sim.runner.from_numbers, []

    def dishonest(rows: Sequence[int]) -> Tensor:
        rows_seen.append(len(rows))
        return honest([row + 1 for row in rows] if len(rows_seen) == 50 else rows)

    monkeypatch.setattr(sim.runner, "from_numbers", dishonest)
    assert "a single machine gives" in problem_of(simulate(small(), 5))


def test_a_leaking_account_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: llmasos.peer.scheduler.Scheduler, session: str) -> None:
        self._sessions.pop(session, None)

    monkeypatch.setattr(llmasos.peer.scheduler.Scheduler, "release", forget)
    assert "the account says" in problem_of(simulate(small(), 5))


def test_what_the_shipped_code_logs_as_an_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: llmasos.peer.engine.Engine, *details: object, **more: object) -> None:
        raise ZeroDivisionError("an unexpected failure")

    monkeypatch.setattr(llmasos.peer.engine.Engine, "submit", fail)
    assert "ZeroDivisionError: an unexpected failure" in problem_of(simulate(small(), 5))


def test_a_request_that_does_not_end_is_seen() -> None:
    text = """
title = "impatient"
duration_s = 5
settle_s = 0.5
[clients]
new_tokens = [500, 500]
"""
    assert "requests have not ended 0.5 s after" in problem_of(simulate(parse(text, "x", "x"), 1))


def test_a_token_that_takes_too_long_is_seen() -> None:
    text = """
title = "slow"
duration_s = 5
[peers]
block_ms = 50
[promises]
stall_s = 1
"""
    assert "a token took" in problem_of(simulate(parse(text, "x", "x"), 1))


def test_a_broken_promise_of_coverage_is_seen() -> None:
    text = """
title = "nobody comes back"
duration_s = 60
[peers]
count = 6
[[faults]]
at_s = 5
kind = "kill"
share = 1.0
[promises]
coverage_s = 20
"""
    assert "block 0 has had no peer for 21 s; 20 s are promised" in problem_of(simulate(parse(text, "x", "x"), 1))


def test_failed_requests_are_counted_against_the_promise() -> None:
    text = """
title = "no room"
duration_s = 10
[peers]
count = 3
kv_tokens = 100
[clients]
patience_s = 3
"""
    report = simulate(parse(text, "x", "x"), 1)
    assert report.errors["MissingBlocksError"] > 0
    assert "requests failed though every block had a peer; 0.0% are promised" in problem_of(report)


def test_failed_requests_are_excused_when_blocks_are_missing() -> None:
    text = """
title = "too few blocks"
duration_s = 10
[peers]
count = 2
blocks = 5
placement = "random"
[clients]
patience_s = 3
"""
    report = simulate(parse(text, "x", "x"), 1)
    assert report.violations == []
    assert report.failed == report.requests > 0
    assert report.longest_gap_s > 5


# --- what only a scenario shows --------------------------------------------------------------------------------------


def test_peers_that_chose_their_blocks_close_a_gap() -> None:
    report = simulate(resize(load("exodus"), clients=3, duration_s=110), 0, thorough=False)
    assert report.violations == []
    assert report.moves > 0
    assert 0 < report.longest_gap_s <= 60
    assert report.failed == 0


def test_what_leads_through_a_relay_takes_longer_and_is_passed_by() -> None:
    def with_relayed(share: float) -> Report:
        scenario = resize(load("relays"), peers=12, clients=3, duration_s=12)
        network = msgspec.structs.replace(scenario.network, relayed=share)
        return simulate(msgspec.structs.replace(scenario, network=network), 3)

    nobody, some, everybody = with_relayed(0.0), with_relayed(0.5), with_relayed(1.0)
    # Three hops, and the way back: four ways of half a round trip, a relay on each.
    assert everybody.token.p50_s - nobody.token.p50_s > 3 * RELAY_RTT_S / 2
    assert everybody.first_token.p50_s > nobody.first_token.p50_s
    used = {
        relayed: [peer.utilisation for peer in some.peers_used if peer.relayed is relayed] for relayed in (True, False)
    }
    assert sum(used[True]) / len(used[True]) < 0.5 * sum(used[False]) / len(used[False])
