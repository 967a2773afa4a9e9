"""Continuous batching as bookkeeping: examples, and a machine that tries everything."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmasos.peer.scheduler import DECODE_ROWS, RECENT_PASSES, GapError, KvFullError, Scheduler


def run_all(scheduler: Scheduler) -> list[list[tuple[str, int, int]]]:
    """Every pass until nothing waits, as (session, position, rows)."""
    passes = []
    while batch := scheduler.schedule():
        passes.append([(piece.session, piece.position, piece.tokens) for piece in batch])
        scheduler.finish(batch)
    return passes


def test_decoding_sessions_share_a_pass() -> None:
    scheduler = Scheduler(kv_tokens=100, max_batch_tokens=64)
    for name in "abc":
        scheduler.admit(name, 10)
        scheduler.submit(name, 0, 0, 1)
    assert run_all(scheduler) == [[("a", 0, 1), ("b", 0, 1), ("c", 0, 1)]]


def test_a_prompt_is_cut_and_never_holds_up_a_decoding_session() -> None:
    scheduler = Scheduler(kv_tokens=1_000, max_batch_tokens=64)
    scheduler.admit("prompt", 300)
    scheduler.admit("decode", 50)
    scheduler.submit("prompt", 0, 0, 150)
    for step in range(2):
        scheduler.submit("decode", step, step, 1)
    assert run_all(scheduler) == [
        [("decode", 0, 1), ("prompt", 0, 63)],
        [("decode", 1, 1), ("prompt", 63, 63)],
        [("prompt", 126, 24)],
    ]


def test_prompts_keep_a_pass_short_while_somebody_decodes() -> None:
    scheduler = Scheduler(kv_tokens=2_000, max_batch_tokens=64)
    scheduler.prompt_rows = 20
    for name, tokens in (("long", 1_500), ("decode", 1), ("short", 18)):
        scheduler.admit(name, 1_600 if name == "long" else 20)
        scheduler.submit(name, 0, 0, tokens)
    passes = run_all(scheduler)
    assert passes[:3] == [
        [("decode", 0, 1), ("long", 0, 20)],
        [("short", 0, 18), ("long", 20, 2)],  # who decodes is expected back any moment
        [("long", 22, 20)],
    ]
    sizes = [sum(rows for _, _, rows in batch) for batch in passes]
    assert sizes[1:RECENT_PASSES] == [20] * (RECENT_PASSES - 1)
    assert sizes[RECENT_PASSES] == 64, "nobody has decoded for a while"


@pytest.mark.parametrize("answered", [True, False])
def test_a_token_is_expected_behind_a_prompt_that_is_answered_at_once(answered: bool) -> None:
    scheduler = Scheduler(kv_tokens=2_000, max_batch_tokens=64)
    scheduler.prompt_rows = 20
    for name, tokens in (("short", 30), ("long", 300)):
        scheduler.admit(name, tokens)
        scheduler.submit(name, 0, 0, tokens, answered=answered and name == "short")
    sizes = [sum(rows for _, _, rows in batch) for batch in run_all(scheduler)]
    assert sizes[:3] == ([64, 20, 20] if answered else [64, 64, 64])


def test_a_prompt_is_not_held_up_by_its_own_session() -> None:
    scheduler = Scheduler(kv_tokens=1_000, max_batch_tokens=64)
    scheduler.prompt_rows = 20
    scheduler.admit("turns", 400)
    for step, tokens in enumerate((100, 1, 100)):
        scheduler.submit("turns", step, scheduler.queued_tokens, tokens)
    assert [rows for ((_, _, rows),) in run_all(scheduler)] == [64, 36, 1, 64, 36]


def test_prompts_take_turns() -> None:
    scheduler = Scheduler(kv_tokens=1_000, max_batch_tokens=50)
    for name in "ab":
        scheduler.admit(name, 200)
        scheduler.submit(name, 0, 0, 100)
    assert [batch[0][0] for batch in run_all(scheduler)] == ["a", "b", "a", "b"]


def test_more_decoding_sessions_than_a_pass_holds_take_turns() -> None:
    scheduler = Scheduler(kv_tokens=100, max_batch_tokens=2)
    for name in "abc":
        scheduler.admit(name, 10)
        for step in range(2):
            scheduler.submit(name, step, step, 1)
    assert [[piece[0] for piece in batch] for batch in run_all(scheduler)] == [["a", "b"], ["c", "a"], ["b", "c"]]


def test_a_prompt_goes_on_however_many_decode() -> None:
    scheduler = Scheduler(kv_tokens=1_000, max_batch_tokens=32)
    scheduler.admit("prompt", 100)
    scheduler.submit("prompt", 0, 0, 100)
    for name in "abc":
        scheduler.admit(name, 200)
        for step in range(4):
            scheduler.submit(name, step, 16 * step, 16)
    passes = run_all(scheduler)
    of_prompt = [sum(rows for name, _, rows in batch if name == "prompt") for batch in passes]
    assert sum(of_prompt[:6]) < 100
    assert all(of_prompt[:6])


@pytest.mark.parametrize("failed", [True, False])
def test_what_a_step_has_cached_that_was_not_finished_does_not_count(failed: bool) -> None:
    scheduler = Scheduler(kv_tokens=1_000, max_batch_tokens=64)
    scheduler.admit("a", 300)
    scheduler.submit("a", 0, 0, 10)
    scheduler.submit("a", 1, 10, 100)
    scheduler.finish(scheduler.schedule())
    scheduler.finish(scheduler.schedule())
    if failed:
        scheduler.fail("a", 10)
    else:
        scheduler.abandon("a")
    with pytest.raises(GapError, match=r"74.*10"):
        scheduler.submit("a", 2, 74, 1)
    scheduler.submit("a", 3, 10, 1)
    assert run_all(scheduler) == [[("a", 10, 1)]]


def test_a_lower_position_rolls_back() -> None:
    scheduler = Scheduler(kv_tokens=100, max_batch_tokens=64)
    scheduler.admit("a", 40)
    scheduler.submit("a", 0, 0, 30)
    run_all(scheduler)
    scheduler.submit("a", 1, 12, 5)
    assert run_all(scheduler) == [[("a", 12, 5)]]
    with pytest.raises(GapError, match=r"18.*17"):
        scheduler.submit("a", 2, 18, 1)
    scheduler.submit("a", 3, 17, 1)


def test_the_budget_holds_and_comes_back() -> None:
    scheduler = Scheduler(kv_tokens=100, max_batch_tokens=64)
    scheduler.admit("a", 60)
    with pytest.raises(KvFullError, match=r"50.*40"):
        scheduler.admit("b", 50)
    scheduler.admit("b", 30)
    scheduler.submit("a", 0, 0, 70)  # outgrows its reservation into what is free
    assert scheduler.kv_free_tokens == 0
    with pytest.raises(KvFullError):
        scheduler.submit("b", 0, 0, 31)
    scheduler.release("a")
    assert (scheduler.kv_free_tokens, scheduler.active_sessions, scheduler.queued_tokens) == (70, 1, 0)
    scheduler.release("a")
    assert scheduler.kv_free_tokens == 70


def test_a_session_released_during_its_pass_is_passed_over() -> None:
    scheduler = Scheduler(kv_tokens=100, max_batch_tokens=64)
    scheduler.admit("a", 40)
    scheduler.submit("a", 0, 0, 5)
    batch = scheduler.schedule()
    scheduler.release("a")
    scheduler.finish(batch)
    scheduler.check()
    assert scheduler.schedule() == ()


class Machine(RuleBasedStateMachine):
    """Any order of calls keeps the laws, runs each row once and in order, and lets nobody wait for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(kv_tokens=300, max_batch_tokens=40)
        self.ends: dict[str, int] = {}
        self.waiting: dict[str, list[tuple[int, int]]] = {}  # session -> rows that must run, as (step, position)
        self.cached: dict[str, int] = {}
        self.step = 0
        self.passed_over: dict[str, int] = {}

    @rule(rows=st.integers(1, 64))
    def bound_prompts(self, rows: int) -> None:
        self.scheduler.prompt_rows = rows

    @rule(name=st.sampled_from("abcdefg"), tokens=st.integers(0, 120))
    def admit(self, name: str, tokens: int) -> None:
        free = self.scheduler.kv_free_tokens
        if name in self.ends:
            with pytest.raises(ValueError, match="open already"):
                self.scheduler.admit(name, tokens)
        elif tokens > free:
            with pytest.raises(KvFullError):
                self.scheduler.admit(name, tokens)
        else:
            self.scheduler.admit(name, tokens)
            self.ends[name], self.waiting[name], self.cached[name] = 0, [], 0

    @precondition(lambda self: self.ends)
    @rule(data=st.data(), tokens=st.one_of(st.integers(0, 3), st.integers(0, 90)))
    def submit(self, data: st.DataObject, tokens: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.ends)))
        position = data.draw(st.integers(0, self.ends[name] + 1))
        self.step += 1
        try:
            self.scheduler.submit(name, self.step, position, tokens)
        except GapError:
            assert position > self.ends[name]
        except KvFullError:
            assert position + tokens > self.ends[name]
        else:
            assert position <= self.ends[name]
            self.ends[name] = position + tokens
            self.waiting[name] += [(self.step, position + row) for row in range(tokens)]

    @rule()
    def run(self) -> None:
        batch = self.scheduler.schedule()
        assert sum(piece.tokens for piece in batch) <= self.scheduler.max_batch_tokens
        served = [piece.session for piece in batch]
        assert len(served) == len(set(served))
        left = [sum(step == piece.step for step, _ in self.waiting[piece.session]) for piece in batch]
        if any(rows <= DECODE_ROWS for rows in left):
            of_prompts = sum(piece.tokens for piece, rows in zip(batch, left, strict=True) if rows > DECODE_ROWS)
            assert of_prompts <= self.scheduler.prompt_rows
        for piece in batch:
            rows = [(piece.step, piece.position + row) for row in range(piece.tokens)]
            assert self.waiting[piece.session][: len(rows)] == rows
            del self.waiting[piece.session][: len(rows)]
            # what of a step has run counts when all of it has: until then it is not there for who abandons it
            done = piece.offset + piece.tokens if piece.completes else 0
            self.cached[piece.session] = piece.position - piece.offset + done
        for name, rows in self.waiting.items():
            decoding = 0 < sum(1 for row in rows if row[0] == rows[0][0]) <= DECODE_ROWS
            self.passed_over[name] = self.passed_over.get(name, 0) + 1 if decoding and name not in served else 0
            assert self.passed_over[name] <= len(self.ends)
        self.scheduler.finish(batch)

    @precondition(lambda self: self.ends)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.ends)))
        self.scheduler.release(name)
        del self.ends[name], self.waiting[name], self.cached[name]

    @precondition(lambda self: self.ends)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.ends)))
        self.scheduler.abandon(name)
        self.ends[name], self.waiting[name] = self.cached[name], []

    @invariant()
    def laws(self) -> None:
        self.scheduler.check()
        assert self.scheduler.queued_tokens == sum(map(len, self.waiting.values()))
        assert self.scheduler.active_sessions == len(self.ends)


TestMachine = Machine.TestCase
