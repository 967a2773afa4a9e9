"""What a session has sent along one link, against the plainest thing that could do the same: a list of rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from llmasos.history import History
from llmasos.wire import Tensor

HIDDEN = 2
ROW_BYTES = 8


def rows_of(values: list[int]) -> Tensor:
    """One number a row."""
    data = b"".join(value.to_bytes(ROW_BYTES, "little") for value in values)
    return Tensor("float32", (len(values), HIDDEN), memoryview(data))


def values_of(rows: Tensor) -> list[int]:
    data = bytes(rows.data)
    return [int.from_bytes(data[at : at + ROW_BYTES], "little") for at in range(0, len(data), ROW_BYTES)]


def filled(*parts: int) -> tuple[History, list[int]]:
    """A history of parts of these lengths, and the same as a list."""
    history, model = History(), list[int]()
    for length in parts:
        part = list(range(len(model) + 100, len(model) + 100 + length))
        history.write(len(model), rows_of(part))
        model += part
    return history, model


class HistoryMachine(RuleBasedStateMachine):
    """Any sequence of writes and cuts leaves what a list would hold."""

    positions = Bundle("positions")

    def __init__(self) -> None:
        super().__init__()
        self.history = History()
        self.model: list[int] = []
        self.next_value = 1

    @rule(target=positions, position=st.integers(0, 30))
    def think_of(self, position: int) -> object:
        return multiple(position)

    @rule(position=positions, count=st.integers(0, 6))
    def write(self, position: int, count: int) -> None:
        part = list(range(self.next_value, self.next_value + count))
        self.next_value += count
        if position > len(self.model):
            with pytest.raises(ValueError, match="ends at"):
                self.history.write(position, rows_of(part))
            return
        self.history.write(position, rows_of(part))
        self.model[position:] = part

    @rule(count=st.integers(1, 6))
    def append(self, count: int) -> None:
        part = list(range(self.next_value, self.next_value + count))
        self.next_value += count
        self.history.write(self.history.length, rows_of(part))
        self.model += part

    @rule(position=positions)
    def cut(self, position: int) -> None:
        self.history.cut(position)
        del self.model[position:]

    @invariant()
    def holds_the_same(self) -> None:
        assert self.history.length == len(self.model)
        if self.model:
            assert values_of(self.history.read(0, len(self.model))) == self.model
            middle = len(self.model) // 2
            assert values_of(self.history.read(middle, len(self.model))) == self.model[middle:]


TestHistoryMachine = HistoryMachine.TestCase


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_any_range_can_be_read(parts: list[int], data: st.DataObject) -> None:
    history, model = filled(*parts)
    start = data.draw(st.integers(0, len(model) - 1))
    end = data.draw(st.integers(start + 1, len(model)))
    assert values_of(history.read(start, end)) == model[start:end]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 7), st.data())
def test_chunks_tile_the_range(parts: list[int], tokens: int, data: st.DataObject) -> None:
    history, model = filled(*parts)
    start = data.draw(st.integers(0, len(model)))
    chunks = [(position, values_of(rows)) for position, rows in history.chunks(start, len(model), tokens)]
    assert [value for _, values in chunks for value in values] == model[start:]
    assert [position for position, _ in chunks] == list(range(start, len(model), tokens))
    assert all(len(values) == tokens for _, values in chunks[:-1])


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 3), (4, 2), (-1, 2), (0, 6), (5, 6)])
def test_rows_that_are_not_there_are_not_read(start: int, end: int) -> None:
    history, _ = filled(2, 3)
    with pytest.raises(ValueError, match="of a history of 5"):
        history.read(start, end)


def test_what_is_read_within_one_part_is_not_copied() -> None:
    part = rows_of([1, 2, 3])
    history = History()
    history.write(0, part)
    assert history.read(1, 3).data.obj is part.data.obj


def test_what_was_mostly_dropped_does_not_hold_the_rest() -> None:
    history, model = filled(13)
    history.cut(2)
    kept = history.read(0, 2)
    assert values_of(kept) == model[:2]
    assert memoryview(kept.data.obj).nbytes == 2 * ROW_BYTES


def test_a_write_that_would_leave_a_hole_changes_nothing() -> None:
    history, model = filled(4)
    with pytest.raises(ValueError, match="rows at 6"):
        history.write(6, rows_of([1]))
    assert values_of(history.read(0, 4)) == model
