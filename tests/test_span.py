"""Half-open ranges of blocks."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmasos.errors import UsageError
from llmasos.span import Span, gaps

spans = st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda pair: Span(pair[0], pair[0] + pair[1]))


@given(spans)
def test_the_written_form_round_trips(span: Span) -> None:
    assert Span.parse(str(span)) == span


def test_a_span_is_half_open() -> None:
    span = Span.parse("3:7")
    assert len(span) == 4
    assert list(span.blocks()) == [3, 4, 5, 6]
    assert 3 in span
    assert 7 not in span


def test_spans_contain_spans() -> None:
    assert Span(3, 5) in Span(3, 7)
    assert Span(3, 7) in Span(3, 7)
    assert Span(2, 4) not in Span(3, 7)
    assert Span(6, 8) not in Span(3, 7)


def test_spans_are_in_the_order_of_their_blocks() -> None:
    assert sorted([Span(5, 6), Span(0, 9), Span(0, 2)]) == [Span(0, 2), Span(0, 9), Span(5, 6)]


@pytest.mark.parametrize("text", [" 0:12 ", "0:12\n", "000:12"])
def test_forgiven_spellings(text: str) -> None:
    assert Span.parse(text) == Span(0, 12)


@pytest.mark.parametrize(
    "text", ["", ":", "3", "3:", ":7", "3-7", "3..7", "a:b", "-1:3", "3:-1", "3:7:9", "1.5:3", "0:1234567", "0: 3"]
)
def test_other_texts_are_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="is not a range of blocks") as caught:
        Span.parse(text)
    assert "--blocks 0:12" in caught.value.hint


@pytest.mark.parametrize(("start", "end"), [(5, 5), (7, 3), (-1, 2)])
def test_empty_and_reversed_ranges_are_wrong_usage(start: int, end: int) -> None:
    with pytest.raises(UsageError, match="the end must lie behind the start") as caught:
        Span(start, end)
    assert "half-open" in caught.value.hint


@given(st.text(max_size=12))
def test_parse_raises_nothing_else(text: str) -> None:
    try:
        span = Span.parse(text)
    except UsageError:
        return
    assert 0 <= span.start < span.end


@given(st.lists(spans, max_size=6), st.integers(1, 50))
def test_gaps_are_the_blocks_that_nobody_has(given_spans: list[Span], blocks: int) -> None:
    found = gaps(given_spans, blocks)
    uncovered = [block for block in range(blocks) if not any(block in span for span in given_spans)]
    assert [block for gap in found for block in gap.blocks()] == uncovered
    for before, after in pairwise(found):
        assert before.end < after.start  # maximal: no two of them touch


def test_gaps_at_both_ends_and_between() -> None:
    assert gaps([Span(8, 12), Span(2, 5)], 14) == [Span(0, 2), Span(5, 8), Span(12, 14)]
    assert gaps([], 3) == [Span(0, 3)]
    assert gaps([Span(0, 9)], 3) == []
