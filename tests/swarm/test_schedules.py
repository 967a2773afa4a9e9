"""Whatever goes wrong with peers, in whatever order: the rows are those that a single machine makes."""

import pytest

from tests.swarm.schedules import failure

SEEDS, GROUPS = 200, 10


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_schedules_of_faults(group: int) -> None:
    for seed in range(group, SEEDS, GROUPS):
        problem = failure(seed)
        assert problem is None, problem
