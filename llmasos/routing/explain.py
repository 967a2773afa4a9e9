"""Why this route: what each hop costs and of what, and what the next best routes would have been."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from llmasos.errors import MissingBlocksError
from llmasos.routing.health import Health
from llmasos.routing.planner import Route, plan
from llmasos.routing.request import RouteRequest
from llmasos.routing.view import SwarmView


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The route that would be taken if one peer of the chosen one were not there."""

    without: str
    route: Route


@dataclass(frozen=True, slots=True)
class Explanation:
    """A route and its runners-up, the cheapest first."""

    route: Route
    runners_up: Sequence[RunnerUp]


def explain(view: SwarmView, request: RouteRequest, now: float, rng: Random, health: Health) -> Explanation:
    """Plan, and plan again without each of the peers chosen. Raises MissingBlocksError when there is no route."""
    route = plan(view, request, now, rng, health)
    others: list[RunnerUp] = []
    for peer in dict.fromkeys(route.peers):
        try:
            other = plan(view, replace(request, exclude=request.exclude | {peer}), now, rng, health)
        except MissingBlocksError:
            continue  # nobody can stand in for it
        if all(other.hops != known.route.hops for known in others):
            others.append(RunnerUp(peer, other))
    return Explanation(route, sorted(others, key=lambda other: other.route.total_s))


def as_json(view: SwarmView, model: str, explanation: Explanation) -> dict[str, Any]:
    """The object of `llmasos route --json`; all costs in seconds for the whole request."""

    def describe(route: Route) -> dict[str, Any]:
        return {
            "total_s": route.total_s,
            "hops": [
                {
                    "peer": hop.peer,
                    "name": record.name if (record := view.record(hop.peer, model)) else "",
                    "blocks": str(hop.span),
                    "total_s": hop.cost.total_s,
                    **asdict(hop.cost),
                }
                for hop in route.hops
            ],
        }

    return {
        "model": model,
        "route": describe(explanation.route),
        "runners_up": [{"without": other.without, **describe(other.route)} for other in explanation.runners_up],
    }
