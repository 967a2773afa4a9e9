import json
from random import Random

import pytest

from llmasos.routing.explain import as_json, explain
from llmasos.routing.health import Health
from llmasos.routing.request import RouteRequest
from tests.routing.builders import NOW, a_record, a_view

VIEW = a_view(
    a_record("near", "0:15", block_seconds=0.001),
    a_record("slow", "0:15", block_seconds=0.004),
    a_record("only", "15:30", block_seconds=0.001),
)
REQUEST = RouteRequest(
    model="smollm2", digest=VIEW.checkpoint("smollm2").digest, model_blocks=30, prompt_tokens=10, new_tokens=20
)


def test_the_cheapest_route_its_costs_and_who_else() -> None:
    explanation = explain(VIEW, REQUEST, NOW, Random(3), Health())
    assert explanation.route.peers == ("near", "only")
    (other,) = explanation.runners_up  # nobody can stand in for "only"
    assert (other.without, other.route.peers) == ("near", ("slow", "only"))
    assert other.route.total_s > explanation.route.total_s


def test_as_json_every_component_adds_up() -> None:
    found = json.loads(json.dumps(as_json(VIEW, "smollm2", explain(VIEW, REQUEST, NOW, Random(3), Health()))))
    for route in (found["route"], *found["runners_up"]):
        for hop in route["hops"]:
            parts = [value for name, value in hop.items() if name.endswith("_s") and name != "total_s"]
            assert sum(parts) == pytest.approx(hop["total_s"])
        assert sum(hop["total_s"] for hop in route["hops"]) == pytest.approx(route["total_s"])
