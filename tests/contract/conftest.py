"""What plays a scenario in each world."""

from collections.abc import Awaitable, Callable, Iterator

import pytest

from sim.loop import run
from tests.contract.worlds import LinkedWorld, P2PWorld, Play, SimWorld, World


@pytest.fixture(scope="session")
def p2p_world() -> Iterator[P2PWorld]:
    world = P2PWorld()
    yield world
    world.close()


@pytest.fixture(params=["sim", "linked", pytest.param("p2p", marks=pytest.mark.swarm)])
def play(request: pytest.FixtureRequest) -> Play:
    """Plays a scenario in a world of either kind."""
    if request.param == "p2p":
        return request.getfixturevalue("p2p_world").run

    def play_sim(scenario: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            await scenario(SimWorld() if request.param == "sim" else LinkedWorld())

        run(main())

    return play_sim
