"""Networks of a test."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from llmasos.config import NetworkConfig
from llmasos.p2p import P2PNetwork
from tests.p2p.networks import Start


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts networks, the later ones joined to the first of the test, and closes them all."""
    async with AsyncExitStack() as stack:
        first: list[P2PNetwork] = []

        async def start_one(*, alone: bool = False, **config: Any) -> P2PNetwork:
            network = await stack.enter_async_context(await P2PNetwork.create(NetworkConfig(**config)))
            if first and not alone:
                await network.join([first[0].multiaddr])
            first.append(network)
            return network

        yield start_one
