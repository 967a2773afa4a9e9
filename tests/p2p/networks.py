"""What tests of the real network have in common."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from llmasos.network import Stream
from llmasos.p2p import P2PNetwork

TOPIC = "smollm2"


async def eventually(found: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not await found():  # noqa: ASYNC110 - nothing tells when another node has noticed
            await asyncio.sleep(0.05)


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


def node_peer(network: P2PNetwork) -> Any:
    return network._daemon.p2p.peer_id


def port_of(network: P2PNetwork) -> int:
    return int(network.contact.addresses[0].rsplit("/", 1)[1])


Start = Callable[..., Awaitable[P2PNetwork]]
