import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.routing import health as health_module
from llmasos.routing.cost import DEFAULT_RTT_S, PRIOR, Load
from llmasos.routing.health import (
    BACKOFF_S,
    DISTRUST,
    FEW_STEPS,
    HALF_LIFE_S,
    MAX_BACKOFF_S,
    MAX_EVIDENCE,
    MAX_PEERS,
    MEMORY_STEPS,
    Health,
)

NOW = 1_000.0


def test_a_stranger_has_no_history() -> None:
    health = Health()
    seen = health.observed("alice", NOW)
    assert (seen.rtt_s, seen.evidence, seen.failures, seen.own_sessions) == (DEFAULT_RTT_S, 0, 0, 0)
    assert not seen.proven
    assert health.avoided_for("alice", NOW) == 0
    assert len(health) == 0  # asking leaves no trace


def test_each_further_failure_doubles_the_backoff_up_to_its_bound() -> None:
    health, now, waits = Health(), NOW, []
    for _ in range(10):
        health.failed("alice", now)
        waits.append(health.avoided_for("alice", now))
        now += waits[-1]
        assert health.avoided_for("alice", now) == 0
    assert waits[:4] == [BACKOFF_S, 2 * BACKOFF_S, 4 * BACKOFF_S, 8 * BACKOFF_S]
    assert waits[-1] == MAX_BACKOFF_S


def test_a_peer_that_takes_many_sessions_with_it_has_failed_once() -> None:
    health = Health()
    for session in range(20):
        health.failed("crowded", NOW + session / 100)
    assert health.observed("crowded", NOW + 1).failures == pytest.approx(0.5 ** (1 / (DISTRUST * BACKOFF_S)))
    assert health.avoided_for("crowded", NOW + BACKOFF_S) == 0
    health.failed("crowded", NOW + BACKOFF_S)
    assert health.avoided_for("crowded", NOW + BACKOFF_S) == 2 * BACKOFF_S


def test_a_peer_that_has_returned_is_left_alone_no_longer() -> None:
    health = Health()
    assert not health.may_be_back("alice", NOW)
    health.failed("alice", NOW)
    health.failed("alice", NOW + BACKOFF_S)
    later = NOW + 2 * BACKOFF_S
    assert not health.may_be_back("alice", later - 0.1)  # it has just failed
    assert health.may_be_back("alice", later)
    health.returned("alice", later)
    assert health.avoided_for("alice", later) == 0
    assert not health.may_be_back("alice", later)
    health.failed("alice", later)
    assert health.avoided_for("alice", later) == 4 * BACKOFF_S  # nothing else is forgiven


def test_a_peer_that_dies_more_often_than_not_is_soon_left_alone() -> None:
    health, now = Health(), NOW
    for _ in range(8):
        for _ in range(2):
            now += health.avoided_for("flaky", now)
            health.failed("flaky", now)
        health.succeeded("flaky")
    assert health.avoided_for("flaky", now) > 60
    for _ in range(8):
        health.succeeded("flaky")
    assert health.observed("flaky", NOW).failures == 0


def test_a_refusal_is_no_failure_and_cannot_ask_for_forever() -> None:
    health = Health()
    health.refused("full", 5.0, NOW)
    health.refused("rude", 1e9, NOW)
    health.refused("odd", -5.0, NOW)
    assert health.avoided_for("full", NOW) == 5.0
    assert health.avoided_for("rude", NOW) == MAX_BACKOFF_S
    assert health.avoided_for("odd", NOW) == 0.0
    assert health.observed("full", NOW).failures == 0


def test_a_mean_follows_and_its_evidence_fades() -> None:
    health = Health()
    for step in range(100):
        health.saw_step("alice", 12, 12 * 0.002, NOW + step / 100)
    seen = health.observed("alice", NOW + 1)
    assert seen.block_s == pytest.approx(0.002)
    assert PRIOR < seen.evidence <= MAX_EVIDENCE
    assert health.observed("alice", NOW + 1 + HALF_LIFE_S).evidence == pytest.approx(seen.evidence / 2, rel=0.01)
    for step in range(30):
        health.saw_step("alice", 12, 12 * 0.008, NOW + 1 + step / 100)
    assert health.observed("alice", NOW + 2).block_s == pytest.approx(0.008, rel=0.05)


def test_a_step_that_waited_for_a_lost_packet_makes_no_peer_slow() -> None:
    health = Health()
    for step in range(20):
        health.saw_step("alice", 8, 8 * 0.002, NOW + step / 100)
    health.saw_step("alice", 8, 0.2, NOW + 1)
    assert health.observed("alice", NOW + 1).block_s == pytest.approx(0.002, rel=0.21)


def test_a_peer_that_has_become_slow_is_found_out_within_a_text() -> None:
    health = Health()
    for step in range(20):
        health.saw_step("alice", 8, 8 * 0.002, NOW + step / 100)
    for step in range(30):
        health.saw_step("alice", 8, 8 * 0.02, NOW + 1 + step / 10)
    assert health.observed("alice", NOW + 4).block_s > 0.015


def test_a_round_trip_that_was_late_by_chance_does_not_count() -> None:
    health = Health()
    for sample in (0.002, 0.003, 0.203):
        health.saw_rtt("alice", sample, NOW)
    assert health.rtt_s("alice") == 0.003
    for _ in range(3):
        health.saw_rtt("alice", 0.07, NOW)
    assert health.rtt_s("alice") == 0.07  # it has moved away


def test_who_was_far_is_hoped_to_be_nearer_as_time_goes_on() -> None:
    health = Health()
    health.saw_rtt("far", 0.202, NOW)
    health.saw_rtt("near", 0.002, NOW)
    assert health.observed("far", NOW).hoped_rtt_s == pytest.approx(0.202)
    later = health.observed("far", NOW + HALF_LIFE_S)
    assert later.hoped_rtt_s == pytest.approx(0.102)
    assert later.rtt_s == 0.202  # what was measured is not forgotten for it
    assert health.observed("stranger", NOW).hoped_rtt_s == 0.002


def test_a_failure_says_less_as_time_goes_on() -> None:
    health = Health()
    health.failed("alice", NOW)
    assert health.observed("alice", NOW).failures == 1
    assert health.observed("alice", NOW + DISTRUST * BACKOFF_S).failures == pytest.approx(0.5)
    health.failed("alice", NOW + 60)
    assert health.observed("alice", NOW + 60).failures == 2  # the first one is not forgotten …
    assert health.avoided_for("alice", NOW + 60) == 2 * BACKOFF_S
    assert health.observed("alice", NOW + 60 + 2 * DISTRUST * BACKOFF_S).failures == 1  # … and makes it fade slower


def test_how_often_a_hop_is_lost_is_learned_from_all_of_them() -> None:
    health = Health()
    assert health.losses_per_step == 0
    for step in range(800):
        health.saw_step(f"peer{step % 5}", 4, 0.01, NOW + step)
    health.lost("peer0", NOW + 800)
    health.failed("peer1", NOW + 800)  # no session was on it
    expected = 1 / (FEW_STEPS + 800)
    assert health.losses_per_step == pytest.approx(expected)
    assert health.observed("stranger", NOW).losses_per_step == health.observed("peer2", NOW).losses_per_step == expected
    assert health.avoided_for("peer0", NOW + 800) == BACKOFF_S
    for step in range(int(MEMORY_STEPS)):
        health.saw_step("peer3", 4, 0.01, NOW + 801 + step)
    assert 0 < health.losses_per_step < 0.2 * expected


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_a_mean_lies_within_its_samples(samples: list[float]) -> None:
    health = Health()
    for number, sample in enumerate(samples):
        health.saw_rtt("alice", sample, NOW + number)
    assert min(samples) - 1e-9 <= health.observed("alice", NOW).rtt_s <= max(samples) + 1e-9


def test_an_unmeasured_peer_is_taken_to_be_as_far_as_the_others() -> None:
    health = Health()
    for peer, rtt_s in [("a", 0.001), ("b", 0.003)]:
        health.saw_rtt(peer, rtt_s, NOW)
    assert health.typical_rtt_s == DEFAULT_RTT_S  # two are too few to tell
    health.saw_rtt("c", 0.002, NOW)
    assert health.typical_rtt_s == health.observed("stranger", NOW).rtt_s == 0.002


def test_what_a_whole_route_took_falls_to_those_that_we_do_not_know() -> None:
    health = Health()
    for _ in range(20):
        health.saw_step("known", 10, 0.010, NOW)
    health.saw_route([("known", 10), ("new", 20)], 0.210, NOW)
    assert health.observed("new", NOW).block_s == pytest.approx(0.010)
    assert health.observed("known", NOW).block_s == pytest.approx(0.001)


def test_between_known_peers_what_a_route_took_is_shared_as_expected() -> None:
    health = Health()
    for _ in range(20):
        health.saw_step("slow", 10, 0.030, NOW)
        health.saw_step("quick", 10, 0.010, NOW)
    for _ in range(60):
        health.saw_route([("slow", 10), ("quick", 10)], 0.080, NOW)
    assert health.observed("slow", NOW).block_s == pytest.approx(0.006, rel=0.02)
    assert health.observed("quick", NOW).block_s == pytest.approx(0.002, rel=0.02)


def test_sessions_count_until_they_close_or_a_record_shows_them() -> None:
    health = Health()
    first, second = health.opened("alice", "a", 300, NOW), health.opened("alice", "b", 70, NOW + 5)
    seen = health.observed("alice", NOW + 6, since=NOW - 1)
    assert (seen.own_sessions, seen.own_tokens) == (2, 370)
    assert health.observed("alice", NOW + 6, since=NOW + 2).own_tokens == 70
    health.closed(first, NOW + 6)
    health.closed(first, NOW + 6)
    assert health.observed("alice", NOW + 6, since=NOW - 1).own_sessions == 1
    health.closed(second, NOW + 6)
    assert health.observed("alice", NOW + 6, since=NOW - 1).own_sessions == 0


def test_what_company_our_sessions_have_is_known_to_prices_as_one_at_most() -> None:
    health = Health()
    health.opened("alice", "a", 300, NOW)
    assert health.observed("alice", NOW, since=NOW).company == 1.0  # nothing is known yet
    assert health.observed("alice", NOW + 300, since=NOW).company == pytest.approx(1 / 32)  # 300 s alone
    for session in "bcd":
        health.opened("bob", session, 300, NOW + 300)
    assert health.observed("bob", NOW + 3_000, since=NOW).company == 1.0
    assert health.observed("carol", NOW + 3_000, since=NOW).company == 1.0  # where we have none, nothing depends on it


def test_two_equal_sessions_close_one_by_one() -> None:
    health = Health()
    tickets = [health.opened("alice", "a", 300, NOW) for _ in range(2)]
    health.closed(tickets[0], NOW)
    health.closed(tickets[0], NOW)
    assert health.observed("alice", NOW, since=NOW).own_sessions == 1


def test_memory_is_bounded_and_running_sessions_are_kept() -> None:
    health = Health()
    health.opened("alice", "a", 10, NOW)
    for number in range(2 * MAX_PEERS):
        health.failed(f"peer{number}", NOW + number)
    assert len(health) == MAX_PEERS
    assert health.observed("alice", NOW, since=NOW).own_sessions == 1
    assert health.observed(f"peer{2 * MAX_PEERS - 1}", NOW).failures == 1
    assert health.observed("peer0", NOW).failures == 0


def test_even_running_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "MAX_PEERS", 3)
    health = Health()
    tickets = [health.opened(f"peer{number}", "a", 1, NOW) for number in range(9)]
    assert len(health) == 3
    for ticket in tickets:
        health.closed(ticket, NOW)
    assert len(health) == 3


def test_what_a_peer_says_of_its_load_holds_until_its_next_record() -> None:
    health = Health()
    health.opened("alice", "a", 100, NOW - 3)
    health.saw_load("alice", Load(sessions=4, queued_tokens=7, kv_free_tokens=50, seen_at=NOW - 2))
    health.opened("alice", "b", 30, NOW - 1)
    fresh = health.observed("alice", NOW, since=NOW - 5)
    assert fresh.load is not None
    assert fresh.load.sessions == 4
    assert (fresh.own_sessions, fresh.own_tokens) == (1, 30)  # the first one is among the four
    outdated = health.observed("alice", NOW, since=NOW - 1.5)
    assert outdated.load is None
    assert outdated.own_sessions == 1
    assert health.heard_of("alice", since=NOW - 2.5)
    assert not health.heard_of("alice", since=NOW - 1.5)
    assert not health.heard_of("bob", since=0.0)


def test_who_was_never_measured_is_typical_or_hoped_to_be_near() -> None:
    health = Health()
    assert health.nearest_rtt_s == DEFAULT_RTT_S
    for peer, rtt_s in (("a", 0.2), ("b", 0.03), ("c", 0.1)):
        health.saw_rtt(peer, rtt_s, NOW)
    health.failed("d", NOW)
    assert health.nearest_rtt_s == 0.03
    assert health.rtt_s("d") == health.rtt_s("nobody") == 0.1
    assert (health.rtt_s("a"), health.measured("a"), health.measured("d")) == (0.2, True, False)
