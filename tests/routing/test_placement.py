from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.config import LEASE_S
from llmasos.errors import UsageError
from llmasos.routing.placement import CREDIT, HYSTERESIS, better_span, choose_span
from llmasos.routing.records import PeerRecord, PeerState
from llmasos.routing.view import Numerics, SwarmView
from llmasos.span import Span
from tests.routing.builders import NOW, a_record, a_view

BLOCKS = 7


@st.composite
def hosts(draw: st.DrawFn, number: int) -> PeerRecord:
    start = draw(st.integers(0, BLOCKS - 1))
    return a_record(
        f"peer{number}",
        model_blocks=BLOCKS,
        span=Span(start, draw(st.integers(start + 1, BLOCKS))),
        throughput=float(draw(st.integers(2, 6))),  # within CREDIT of one another: no claim is cut
        state=draw(st.sampled_from([PeerState.ONLINE, PeerState.ONLINE, PeerState.JOINING, PeerState.DRAINING])),
    )


swarms = st.integers(0, 6).flatmap(lambda peers: st.tuples(*(hosts(number) for number in range(peers))))


def strengths(records: tuple[PeerRecord, ...]) -> list[float]:
    counted = [record for record in records if record.state in (PeerState.ONLINE, PeerState.JOINING)]
    return [sum(record.throughput for record in counted if block in record.span) for block in range(BLOCKS)]


@given(swarms, st.integers(1, 9), st.integers(2, 6), st.integers(0, 2**32))
def test_no_other_range_leaves_the_weakest_blocks_stronger(
    records: tuple[PeerRecord, ...], max_blocks: int, throughput: int, seed: int
) -> None:
    chosen = choose_span(a_view(*records), "smollm2", BLOCKS, max_blocks, float(throughput), NOW, Random(seed))
    assert len(chosen) == min(max_blocks, BLOCKS)

    def outcome(span: Span) -> list[float]:
        return sorted(rows + throughput * (block in span) for block, rows in enumerate(strengths(records)))

    possible = [Span(s, e) for s in range(BLOCKS) for e in range(s + 1, BLOCKS + 1) if e - s <= max_blocks]
    assert outcome(chosen) == max(outcome(span) for span in possible)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_peers_that_come_one_by_one_cover_a_model_with_as_few_as_can_be(blocks: int, room: int, seed: int) -> None:
    view, rng = SwarmView(), Random(seed)
    for number in range(-(-blocks // room)):
        span = choose_span(view, "smollm2", blocks, room, 50.0, NOW, rng)
        view.add(a_record(f"peer{number}", span=span, model_blocks=blocks, throughput=50.0, state=PeerState.JOINING))
    covered = {block for record in view.peers("smollm2") for block in record.span.blocks()}
    assert covered == set(range(blocks))


def test_peers_that_start_together_do_not_all_choose_the_same() -> None:
    chosen = Counter(choose_span(SwarmView(), "smollm2", 30, 10, 50.0, NOW, Random(seed)) for seed in range(300))
    assert len(chosen) >= 3
    assert max(chosen.values()) < 150
    assert set(chosen) <= {Span(0, 10), Span(10, 20), Span(20, 30)}  # other cuts would need a fourth peer


def test_the_weakest_block_is_strengthened_not_the_emptiest_range() -> None:
    view = a_view(
        a_record("a", "0:10", throughput=20.0),
        a_record("b", "0:10", throughput=20.0),
        a_record("c", "10:20", throughput=30.0),
        a_record("d", "20:30", throughput=50.0),
    )
    assert choose_span(view, "smollm2", 30, 10, 40.0, NOW, Random(1)) == Span(10, 20)


def test_a_liar_does_not_keep_a_range_to_itself() -> None:
    view = a_view(
        a_record("liar", "0:15", throughput=1e9),
        a_record("a", "15:30", throughput=50.0),
        *(a_record(f"peer{number}", "15:30", throughput=50.0) for number in range(int(CREDIT) + 1)),
    )
    assert choose_span(view, "smollm2", 30, 15, 50.0, NOW, Random(1)) == Span(0, 15)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": PeerState.OFFLINE},
        {"announced_at": NOW - LEASE_S},
        {"digest": "sha256:ee"},
        {"dtype": "bfloat16"},
        {"peer": "me"},
        {"model_blocks": 29},
    ],
)
def test_who_cannot_be_chained_with_us_does_not_count(changes: dict[str, object]) -> None:
    view = a_view(a_record("a", "0:14"), a_record(**{"peer": "b", "blocks": "14:29"} | changes))
    chosen = choose_span(
        view,
        "smollm2",
        30,
        16,
        50.0,
        NOW,
        Random(1),
        digest="sha256:00ff",
        numerics=Numerics("float32", "none"),
        me="me",
    )
    assert chosen == Span(14, 30)


def test_without_room_for_a_block_there_is_nothing_to_choose() -> None:
    with pytest.raises(UsageError, match="single block"):
        choose_span(SwarmView(), "smollm2", 30, 0, 50.0, NOW, Random(1))


# --- moving -----------------------------------------------------------------------------------------------------------


@given(swarms.filter(bool), st.integers(0, 2**32))
def test_a_move_leaves_the_swarm_stronger_and_opens_no_gap(records: tuple[PeerRecord, ...], seed: int) -> None:
    me = records[0]
    move = better_span(a_view(*records), me, NOW, Random(seed))
    if move is None:
        return
    before = strengths(records[1:])
    with_me_here = sorted(rows + me.throughput * (block in me.span) for block, rows in enumerate(before))
    with_me_there = sorted(rows + me.throughput * (block in move.span) for block, rows in enumerate(before))
    assert with_me_there > with_me_here
    assert with_me_there.count(0.0) <= with_me_here.count(0.0)
    assert move.urgent == any(before[block] == 0.0 and block not in me.span for block in move.span.blocks())
    assert len(move.span) == len(me.span)


@given(swarms.filter(bool), st.integers(0, 2**32))
def test_moves_come_to_an_end(records: tuple[PeerRecord, ...], seed: int) -> None:
    """Each in turn goes where it is of more use, until nobody does."""
    rng, standing = Random(seed), [record for record in records if record.state is PeerState.ONLINE]
    for _ in range(50):
        moves = [(record, better_span(a_view(*standing), record, NOW, rng)) for record in standing]
        wanted = [(record, move) for record, move in moves if move is not None]
        if not wanted:
            return
        record, move = wanted[0]
        standing[standing.index(record)] = replace(record, span=move.span)
    raise AssertionError("fifty moves, and no end")


@pytest.mark.parametrize(
    ("beside_me", "there", "moves"),
    [
        (1, 0, True),  # a gap: one who is not alone is enough
        (0, 0, False),  # the only holder does not open another
        (1, 1, False),  # two and one are near enough to equal
        (2, 1, False),
        (3, 1, True),
        (9, 7, False),
        (12, 7, True),
    ],
)
def test_when_it_is_worth_it(beside_me: int, there: int, moves: bool) -> None:
    me = a_record("me", "0:15")
    view = a_view(
        me,
        *(a_record(f"here{n}", "0:15") for n in range(beside_me)),
        *(a_record(f"there{n}", "15:30") for n in range(there)),
    )
    move = better_span(view, me, NOW, Random(1))
    assert (move is not None) == moves == (there == 0 < beside_me or beside_me >= HYSTERESIS * (there + 1))
    if move is not None:
        assert (move.span, move.urgent) == (Span(15, 30), there == 0)


def test_who_is_on_the_way_counts() -> None:
    me = a_record("me", "0:15")
    coming = a_record("coming", "15:30", state=PeerState.JOINING)
    assert better_span(a_view(me, a_record("here", "0:15"), coming), me, NOW, Random(1)) is None
