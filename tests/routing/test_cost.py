import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.routing.cost import (
    CROWD_ROWS,
    DEFAULT_RTT_S,
    FAILOVER_S,
    HOP_S,
    PRIOR,
    UNKNOWN,
    Load,
    Observed,
    Work,
    hop_cost,
    hop_price,
)
from tests.routing.builders import a_record

WORK = Work(prompt_tokens=300, new_tokens=50, row_bytes=2_304)

observations = st.builds(
    Observed,
    rtt_s=st.floats(0, 1),
    block_s=st.floats(1e-5, 1),
    evidence=st.floats(0, 64),
    failures=st.floats(0, 8),
    own_sessions=st.integers(0, 20),
    company=st.floats(0, 1),
    load=st.none() | st.builds(Load, st.integers(0, 20), st.integers(0, 900), st.just(4_000), st.just(0.0)),
    hoped_rtt_s=st.floats(0, 1),
    losses_per_step=st.floats(0, 1),
)


def test_an_idle_peer_costs_link_and_compute_and_nothing_else() -> None:
    cost = hop_cost(a_record(block_seconds=0.002, row_seconds=0.0001), 4, WORK)
    transfer_s = 350 * 2_304 / 12.5e6
    assert cost.link_s == pytest.approx(51 * (DEFAULT_RTT_S + HOP_S) + transfer_s)
    assert cost.compute_s == pytest.approx(4 * (50 * 0.002 + 3 * 0.002 + 300 * 0.0001))  # 300 rows are 3 chunks
    assert (cost.wait_s, cost.own_s, cost.risk_s, cost.doubt_s) == (0, 0, 0, 0)


@given(st.integers(0, 1_000), st.integers(0, 500), st.integers(0, 50), st.integers(0, 5_000), observations)
def test_a_cost_is_linear_in_blocks_and_its_parts_add_up(
    prompt_tokens: int, new_tokens: int, active_sessions: int, queued_tokens: int, seen: Observed
) -> None:
    record = a_record(active_sessions=active_sessions, queued_tokens=queued_tokens)
    costs = [hop_cost(record, blocks, Work(prompt_tokens, new_tokens), seen) for blocks in (0, 1, 12)]
    fixed_s, one_s, twelve_s = (cost.total_s for cost in costs)
    assert twelve_s == pytest.approx(fixed_s + 12 * (one_s - fixed_s))
    for cost in costs:
        parts = (cost.link_s, cost.compute_s, cost.wait_s, cost.own_s, cost.risk_s, cost.doubt_s)
        assert min(parts) >= -1e-9
        assert cost.total_s == pytest.approx(sum(parts))
    price = hop_price(record, Work(prompt_tokens, new_tokens), seen)
    assert price == pytest.approx((fixed_s, one_s - fixed_s, costs[0].link_s))


@pytest.mark.parametrize("busier", [{"active_sessions": 3}, {"queued_tokens": 500}, {"block_seconds": 0.001}])
def test_a_busier_or_slower_peer_is_dearer(busier: dict[str, float]) -> None:
    assert hop_cost(a_record(**busier), 5, WORK).total_s > hop_cost(a_record(), 5, WORK).total_s


def test_our_own_sessions_that_no_record_shows_yet_count_like_announced_ones() -> None:
    announced = hop_cost(a_record(active_sessions=3), 5, WORK)
    ours = hop_cost(a_record(), 5, WORK, UNKNOWN._replace(own_sessions=3))
    assert ours.own_s == pytest.approx(announced.wait_s)
    # the pass that we arrive in the middle of is as long as the batch of all sessions
    assert ours.total_s == pytest.approx(announced.total_s)


def test_a_session_of_ours_beside_which_no_other_ever_ran_counts_half_and_without_prompts() -> None:
    """It is halfway through, and nothing is to follow: for half of our steps one row is added, and its pass is met."""
    ours = hop_cost(a_record(), 6, WORK, UNKNOWN._replace(own_sessions=1, company=0.0))
    row_s, block_s = 0.0002, 0.0007
    there = 0.5 * 12 / 30
    rest_of_a_pass_s = 0.5 * 12 * (block_s + 0.5 * row_s) * there / (there + 1)
    assert ours.own_s == pytest.approx(50 * (6 * 0.5 * row_s + rest_of_a_pass_s))
    between = hop_cost(a_record(), 6, WORK, UNKNOWN._replace(own_sessions=1, company=0.4))
    assert ours.own_s < between.own_s < hop_cost(a_record(), 6, WORK, UNKNOWN._replace(own_sessions=1)).own_s


def test_a_pass_is_less_likely_to_be_met_where_sessions_spend_less_of_their_time() -> None:
    """Each session is at one peer at a time: at one of six blocks for a sixth of it, at one of all for all of it."""
    work = Work(prompt_tokens=0, new_tokens=1)
    waits = [
        hop_cost(a_record(blocks=f"0:{blocks}", active_sessions=1, row_seconds=1e-9), 0, work).wait_s
        for blocks in (5, 30)
    ]
    passes_s = [blocks * 0.0007 for blocks in (5, 30)]
    assert waits == pytest.approx([0.5 * passes_s[0] / 7, 0.5 * passes_s[1] / 2], rel=1e-3)


def test_evidence_outweighs_the_claim_as_it_grows() -> None:
    liar = a_record(block_seconds=1e-6, row_seconds=1e-9)
    truth_s = 12 * 51 * 0.01  # 0.01 s a block, for 50 steps and one prompt
    work = Work(prompt_tokens=1, new_tokens=50)
    compute_s = [
        hop_cost(liar, 12, work, Observed(block_s=0.01, evidence=evidence)).compute_s
        for evidence in (0.0, 1.0, PRIOR, 60.0)
    ]
    assert compute_s == sorted(compute_s)
    assert compute_s[0] < 0.001 * truth_s
    assert compute_s[2] == pytest.approx(truth_s / 2, rel=0.01)
    assert compute_s[3] > 0.85 * truth_s


def test_waiting_that_we_have_seen_is_not_counted_twice() -> None:
    record = a_record(active_sessions=5, queued_tokens=300)
    seen = Observed(block_s=0.01, evidence=1e9)
    assert hop_cost(record, 1, WORK, seen).wait_s < hop_cost(record, 1, WORK).wait_s


def test_failures_cost_what_a_failover_does() -> None:
    seen = UNKNOWN._replace(failures=3)
    assert hop_cost(a_record(), 2, WORK, seen).risk_s == 3 * FAILOVER_S


def test_each_hop_is_charged_with_what_hops_have_cost_in_failovers() -> None:
    seen = UNKNOWN._replace(losses_per_step=0.002)
    assert hop_cost(a_record(), 2, WORK, seen).risk_s == pytest.approx(50 * 0.002 * FAILOVER_S)


def test_what_a_peer_has_just_said_of_its_load_counts_and_not_its_record() -> None:
    record, busy = a_record(active_sessions=5, queued_tokens=300), a_record(active_sessions=2, queued_tokens=40)
    seen = UNKNOWN._replace(load=Load(sessions=2, queued_tokens=40, kv_free_tokens=9, seen_at=0.0))
    assert hop_cost(record, 7, WORK, seen) == hop_cost(busy, 7, WORK)


def test_a_session_on_a_peer_counts_with_the_prompts_that_it_brings() -> None:
    """One row a step is what it decodes; a peer with four sessions holds ours up by far more than four rows."""
    alone = hop_cost(a_record(row_seconds=0.0002), 6, WORK)
    crowded = hop_cost(a_record(row_seconds=0.0002, active_sessions=4), 6, WORK)
    rows_s = 50 * 6 * 4 * CROWD_ROWS * 0.0002  # steps, blocks, sessions
    there = 4 * 12 / 30  # sessions that are at this peer at a time, which has 12 of 30 blocks
    rest_of_a_pass_s = 50 * 0.5 * 12 * (0.0007 + 4 * CROWD_ROWS * 0.0002) * there / (there + 1)
    assert crowded.total_s - alone.total_s == pytest.approx(rows_s + rest_of_a_pass_s)
    # By their own rows alone a peer of a quarter of the speed would be dearer than this crowd; it is not.
    assert hop_cost(a_record(row_seconds=0.0002, block_seconds=0.003), 6, WORK).total_s < crowded.total_s
