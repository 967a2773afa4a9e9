import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.routing.tickets import MEMORY_S, USUAL_COMPANY, Tickets
from tests.routing.builders import NOW


def test_a_session_alone_is_slowly_known_to_be_alone() -> None:
    tickets = Tickets()
    tickets.open("alice", "a", 7, NOW)
    tickets.open("bob", "a", 7, NOW)  # another hop of the same session is no company
    assert tickets.company(NOW) == USUAL_COMPANY
    assert tickets.company(NOW + MEMORY_S) == pytest.approx(USUAL_COMPANY / 2)
    assert tickets.company(NOW + 2 * MEMORY_S) == pytest.approx(USUAL_COMPANY / 4)


def test_many_sessions_are_soon_known_to_be_many() -> None:
    tickets = Tickets()
    for session in range(16):
        tickets.open("alice", str(session), 7, NOW)
    assert tickets.company(NOW + MEMORY_S / 16) == pytest.approx(8)  # a minute of sessions, each with fifteen others


def test_it_does_not_matter_how_often_one_asks() -> None:
    asked, left = Tickets(), Tickets()
    for tickets in (asked, left):
        for session in range(3):
            tickets.open("alice", str(session), 7, NOW)
    for second in range(40):
        asked.company(NOW + second)
    assert asked.company(NOW + 40) == pytest.approx(left.company(NOW + 40))


def test_time_without_a_session_says_nothing() -> None:
    tickets = Tickets()
    first = tickets.open("alice", "a", 7, NOW)
    tickets.close(first, NOW + MEMORY_S)
    known = tickets.company(NOW + MEMORY_S)
    assert known == pytest.approx(USUAL_COMPANY / 2)
    assert tickets.company(NOW + 9_000) == known
    tickets.open("alice", "b", 7, NOW + 9_000)
    assert tickets.company(NOW + 9_000) == known


def test_a_session_lasts_until_its_last_hop_is_left() -> None:
    tickets = Tickets()
    hops = [tickets.open(peer, "a", 7, NOW) for peer in ("alice", "bob")]
    other = tickets.open("carol", "b", 7, NOW)
    tickets.close(hops[0], NOW)
    assert len(tickets) == 2
    assert tickets.on("alice") == ()
    assert list(tickets.on("bob")) == [hops[1]]
    assert tickets.company(NOW + 1e9) == pytest.approx(1.0)  # they are still two
    tickets.close(hops[1], NOW + 1e9)
    tickets.close(hops[1], NOW + 1e9)
    assert tickets.company(NOW + 2e9) == pytest.approx(0.0, abs=1e-3)
    tickets.close(other, NOW + 2e9)
    assert len(tickets) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.floats(-5, 50), st.booleans())))
def test_company_stays_between_none_and_all_that_there_are(
    events: list[tuple[str, str, float, bool]],
) -> None:
    tickets, opened, now, most = Tickets(), [], NOW, USUAL_COMPANY + 1
    for peer, session, later_s, opens in events:
        now += later_s  # network time may be set back
        if opens:
            opened.append(tickets.open(peer, session, 7, now))
        elif opened:
            tickets.close(opened.pop(), now)
        most = max(most, len({ticket.session for ticket in opened}))
        assert 0.0 <= tickets.company(now) <= most - 1
        for name in "abc":
            assert list(tickets.on(name)) == [ticket for ticket in opened if ticket.peer == name]
