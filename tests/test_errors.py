"""The tree of errors is what callers catch, gateways translate and commands exit with: it is held to its docstring."""

import inspect
import re
import shlex

import pytest

from llmasos import errors
from llmasos.errors import (
    ConnectionLostError,
    LLMasOSError,
    MissingBlocksError,
    PeerError,
    PeerFaultError,
    PeerRefusedError,
    PeerTimeoutError,
    UsageError,
)

PEER = "12D3KooWPk51brrtu3iCxm9Q5MUSArhMDM6ZsuF3ifu92U5HNJna"

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, LLMasOSError)]


def drawn_tree() -> dict[str, str]:
    """class -> its parent, as the module's docstring draws them."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    (?P<indent>[│├└─ ]*)(?P<name>[A-Za-z]+Error)", line)
        if match:
            depth = len(match["indent"]) // 4
            path[depth:] = [match["name"]]
            parents[match["name"]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_docstring_draws_the_tree() -> None:
    assert {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES} == drawn_tree()


def test_ours_is_never_retried_elsewhere_and_the_peers_always_may_be() -> None:
    assert not UsageError.retryable
    assert all(cls.retryable for cls in CLASSES if issubclass(cls, PeerError))


@pytest.mark.parametrize("cls", CLASSES)
def test_statuses_are_those_of_http(cls: type[LLMasOSError]) -> None:
    assert 400 <= cls.http_status < 600
    assert cls.retryable == (cls.http_status in (502, 503, 504))


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("UsageError", 400),
        ("UnsupportedModelError", 400),
        ("UnknownModelError", 404),
        ("CheckpointError", 500),
        ("PeerError", 502),
        ("SwarmError", 503),
        ("PeerTimeoutError", 504),
    ],
)
def test_some_statuses_are_promised(name: str, status: int) -> None:
    assert getattr(errors, name).http_status == status


def test_an_error_says_what_happened_and_what_to_type() -> None:
    error = UsageError("5:3 is not a range", hint="try --blocks 3:5")
    assert str(error) == "5:3 is not a range\n  try --blocks 3:5"
    assert str(UsageError("no hint")) == "no hint"


def test_missing_blocks_name_the_gaps_and_the_command_that_fills_them() -> None:
    error = MissingBlocksError("smollm2", ["4:7", "20:30"], generated="The world", why="2 full")
    assert error.message == "blocks 4:7, 20:30 of smollm2 have no peer (2 full)"
    assert "python -m llmasos.peer --blocks 4:7 --model smollm2 --join" in error.hint
    assert error.missing == ["4:7", "20:30"]
    assert error.generated == "The world"


def test_who_wants_other_numbers_is_told_how_to_serve_those() -> None:
    error = MissingBlocksError("smollm2", ["4:7"], why="3 serving float32")
    assert "--quantize int8 --join" in error.wanting("float32", "int8").hint
    assert "--dtype bfloat16 --join" in error.wanting("bfloat16", "none").hint
    assert error.wanting("float32", "none").hint == MissingBlocksError("smollm2", ["4:7"]).hint


@pytest.mark.parametrize("name", ["$(reboot)", "m; reboot #", "it's", "a b"])
def test_the_name_of_a_model_is_one_word_of_the_command(name: str) -> None:
    words = shlex.split(MissingBlocksError(name, ["4:7"]).hint.removeprefix("serve them: "))
    assert words[words.index("--model") + 1] == name
    assert len(words) == len(shlex.split(MissingBlocksError("m", ["4:7"]).hint)) - len(["serve", "them"])


def test_missing_blocks_that_nobody_can_name() -> None:
    assert MissingBlocksError("smollm2", []).hint == ""


@pytest.mark.parametrize("cls", [ConnectionLostError, PeerTimeoutError, PeerFaultError, PeerRefusedError])
def test_an_error_of_a_peer_names_it_briefly(cls: type[PeerError]) -> None:
    error = cls(PEER, "is silent")
    assert error.message == f"peer {PEER[-8:]}: is silent"
    assert error.peer == PEER
    assert error.reason == "is silent"


def test_a_refusal_says_when_to_come_back() -> None:
    assert PeerRefusedError(PEER, "full", retry_after_s=2.5).retry_after_s == 2.5


def test_everything_public_is_caught_by_the_base() -> None:
    import llmasos

    raised = [getattr(llmasos, name) for name in llmasos.__all__ if name.endswith("Error")]
    assert all(issubclass(cls, llmasos.LLMasOSError) for cls in raised)
    assert {cls.__name__ for cls in raised} == {cls.__name__ for cls in CLASSES}
