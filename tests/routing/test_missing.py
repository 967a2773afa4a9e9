"""Why there is no route: each gap is named, with what stands in the way of those who have it."""

from random import Random

import pytest

from llmasos.config import LEASE_S
from llmasos.errors import MissingBlocksError
from llmasos.routing.planner import plan
from llmasos.routing.records import PeerState
from llmasos.routing.view import SwarmView
from tests.routing.builders import NOW, a_record, a_request, a_view


@pytest.mark.parametrize(
    ("changes", "asked", "reason"),
    [
        ({"state": PeerState.DRAINING}, {}, "2 draining"),
        ({"state": PeerState.JOINING}, {}, "2 joining"),
        ({"kv_free_tokens": 99}, {}, "2 full"),
        ({"dtype": "bfloat16"}, {}, "2 serving bfloat16"),
        ({"quantization": "int4"}, {"quantization": "none"}, "2 serving float32 int4"),
        ({"digest": "sha256:ee"}, {}, "2 of another checkpoint"),
        ({}, {"exclude": frozenset({"b", "c"})}, "2 excluded"),
        ({}, {"pin": ("a",)}, "2 not pinned"),
        ({"announced_at": NOW - LEASE_S}, {}, "2 gone"),
        ({"blocks": "28:30"}, {}, "nobody serves them"),
    ],
)
def test_the_error_says_why(changes: dict[str, object], asked: dict[str, object], reason: str) -> None:
    blocks = str(changes.pop("blocks", "20:28"))
    view = a_view(
        a_record("a", "0:20"),
        a_record("d", "28:30"),
        a_record("b", blocks, **changes),
        a_record("c", blocks, **changes),
    )
    if asked.get("pin"):
        view = a_view(a_record("a", "0:20"), a_record("b", "20:28"), a_record("c", "20:28"))
    asked = {"dtype": "float32"} | asked
    with pytest.raises(MissingBlocksError) as missing:
        plan(view, a_request(end=28, **asked), NOW, Random(1))
    assert missing.value.missing == ["20:28"]
    assert f"20:28: {reason}" in missing.value.message
    assert "--blocks 20:28" in missing.value.hint


def test_each_gap_has_its_own_reason() -> None:
    view = a_view(
        a_record("a", "0:10"),
        a_record("b", "10:14", state=PeerState.DRAINING),
        a_record("c", "12:14", kv_free_tokens=0),
        a_record("d", "14:28"),
    )
    with pytest.raises(MissingBlocksError) as missing:
        plan(view, a_request(), NOW, Random(1))
    assert missing.value.missing == ["10:14", "28:30"]
    assert "10:14: 1 draining, 1 full; 28:30: nobody serves them" in missing.value.message


def test_halves_in_different_numerics_are_no_whole() -> None:
    view = a_view(a_record("a", "0:16"), a_record("b", "16:30", dtype="bfloat16"))
    with pytest.raises(MissingBlocksError, match="16:30: 1 serving bfloat16, the rest being float32"):
        plan(view, a_request(), NOW, Random(1))
    assert plan(view, a_request(mixed=True), NOW, Random(1)).peers == ("a", "b")


def test_a_model_that_nobody_announces() -> None:
    with pytest.raises(MissingBlocksError, match="no peer serves smollm2") as missing:
        plan(SwarmView(), a_request(), NOW, Random(1))
    assert "--blocks auto" in missing.value.hint
    with pytest.raises(MissingBlocksError, match="0:30: nobody serves them"):
        plan(SwarmView(), a_request(model_blocks=30), NOW, Random(1))
    with pytest.raises(MissingBlocksError, match="5:9: 1 of another checkpoint"):
        plan(a_view(a_record(digest="sha256:ee")), a_request(start=5, end=9), NOW, Random(1))
