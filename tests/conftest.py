"""How the tests are shared out among workers."""

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes a file at a time, and all of tests/clients at once: those files share a swarm of processes."""
    from xdist.scheduler import LoadFileScheduling

    class OneSwarm(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/clients" if nodeid.startswith("tests/clients/") else super()._split_scope(nodeid)

    return OneSwarm(config, log) if config.getvalue("dist") == "loadfile" else None
