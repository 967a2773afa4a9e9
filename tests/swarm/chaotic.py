"""A swarm in virtual time whose rows are real numbers, and whose blocks blow up each rounding on the way."""

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmasos.client.router import Router
from llmasos.client.session import Session
from llmasos.config import ClientConfig, Codec, DType, PeerConfig
from llmasos.network import Handler, Stream
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.peer.runner import Chunk, Fault, Speed
from llmasos.routing.directory import Directory
from llmasos.routing.planner import RouteRequest
from llmasos.span import Span
from llmasos.wire import PROTOCOL, Tensor
from sim.loop import run
from sim.network import SimSwarm

T = TypeVar("T")
Floats = NDArray[np.float32]

BLOCKS, HIDDEN = 6, 70
LOSSY: tuple[Codec, ...] = ("bfloat16", "int8")


class ChaoticRunner:
    """Blocks of real numbers in which each rounding on the way is blown up: y = frac(3 x + 2 y before + block)."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.hidden_size = HIDDEN
        self.dtype: DType = "float32"
        self._caches: dict[str, dict[int, list[Floats]]] = {}

    async def run(self, chunks: Sequence[Chunk]) -> list[Tensor | Fault]:
        return [self._compute(chunk) for chunk in chunks]

    async def measure(self) -> Speed:
        return Speed(0.001, 0.0001)

    def fork(self, source: str, target: str, tokens: int) -> None:
        self._caches[target] = {block: rows[:tokens] for block, rows in self._caches[source].items()}

    def release(self, session: str) -> None:
        self._caches.pop(session, None)

    async def close(self) -> None:
        self._caches.clear()

    def _compute(self, chunk: Chunk) -> Tensor | Fault:
        if chunk.hidden.hidden != HIDDEN or chunk.hidden.codec != "exact":
            return Fault(f"expected plain rows of {HIDDEN}", sender=True)
        rows = list(floats(chunk.hidden))
        if not np.isfinite(rows).all():
            return Fault("the activations hold NaN or infinity", sender=True)
        caches = self._caches.setdefault(chunk.session, {block: [] for block in chunk.span.blocks()})
        for block in chunk.span.blocks():
            cache = caches[block]
            del cache[chunk.position :]
            for index, row in enumerate(rows):
                sums = 3 * np.roll(row, 1) + np.float32(0.37 * block)
                sums = sums + 2 * cache[-1] if cache else sums
                rows[index] = sums - np.rint(sums)
                cache.append(rows[index])
        return tensor(np.array(rows))


def floats(rows: Tensor) -> Floats:
    return np.frombuffer(rows.data, np.float32).reshape(rows.shape)


def tensor(rows: Floats) -> Tensor:
    return Tensor("float32", rows.shape, memoryview(rows.astype(np.float32).tobytes()))


class Swarm:
    """Peers by their names, and clients of them, until the scenario ends."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.world = SimSwarm(seed=3)
        self.peers: dict[str, Peer] = {}
        self._stack = stack

    async def start(self, *spans: str, through: Callable[[Stream], Stream] | None = None) -> None:
        """Peers whose inbound streams are as `through` makes them."""
        for span in spans:
            name = f"{span} no. {len(self.peers)}"
            place = await self._stack.enter_async_context(self.world.network(name))
            served = Served("chaotic", "chaotic", BLOCKS, 4_096)
            peer = Peer(place, ChaoticRunner(Span.parse(span)), served, PeerConfig(name=name), kv_tokens=8_192)
            self.peers[name] = await self._stack.enter_async_context(peer)
            if through is not None:
                place.serve(PROTOCOL, partial(serve_through, through, peer.handler))

    def kill(self, session: Session, *hops: int) -> None:
        for peer in [session.route.hops[hop].peer for hop in hops]:
            self.world.kill(peer)

    async def client(self, codec: Codec, **options: Any) -> Callable[..., Session]:
        """Makes sessions of one client, given the keys of the pages that their prompt begins with."""
        name = f"client {len(self.world.members)}"
        place = await self._stack.enter_async_context(self.world.network(name, listen=False))
        config = ClientConfig(codec=codec, **options)
        router = Router(place, Directory(place), config, random.Random(1))
        self._stack.push_async_callback(router.close)
        request = RouteRequest(model="chaotic", digest="chaotic", model_blocks=BLOCKS, kv_tokens=1_024)
        return lambda prefix=(): Session(place, router, request, config, prefix=prefix)


async def serve_through(through: Callable[[Stream], Stream], handler: Handler, stream: Stream) -> None:
    await handler(through(stream))


def in_swarm(scenario: Callable[[Swarm], Awaitable[T]]) -> T:
    async def main() -> T:
        async with AsyncExitStack() as stack:
            return await scenario(Swarm(stack))

    return run(main())


PROMPT_TOKENS = 150
PAGES = tuple(bytes([page]) * 16 for page in range(PROMPT_TOKENS // 64))
"""The keys of what the prompt begins with."""
Trouble = Callable[[Swarm, Session], Awaitable[None]]


def prompt() -> Floats:
    return np.random.default_rng(5).uniform(-0.5, 0.5, (PROMPT_TOKENS, HIDDEN)).astype(np.float32)


async def write(swarm: Swarm, session: Session, trouble: dict[int, Trouble] | None = None) -> list[bytes]:
    """A prompt and thirty tokens behind it, each made of the last answer; now and then with guesses, which are wrong.

    `trouble` befalls the swarm before the step of that number; step 0 is the prompt.
    """
    rows, answers = prompt(), []
    for number in range(31):
        if trouble and number in trouble:
            await trouble[number](swarm, session)
        position = session.length if number == 0 else PROMPT_TOKENS + number - 1
        guesses = np.zeros((4 if number % 3 == 2 else 0, HIDDEN), np.float32)
        kept = len(guesses) + 1
        answer = await session.forward(tensor(np.concatenate([rows[position:], guesses])), position=position, keep=kept)
        row = floats(answer)[:1]
        answers.append(row.tobytes())
        rows = np.concatenate([rows, row])
    return answers


def written(codec: Codec, *spans: str, trouble: dict[int, Trouble] | None = None, **options: Any) -> list[bytes]:
    async def scenario(swarm: Swarm) -> list[bytes]:
        await swarm.start(*spans)
        async with (await swarm.client(codec, **options))() as session:
            return await write(swarm, session, trouble)

    return in_swarm(scenario)


def lose(*hops: int, instead: Sequence[str]) -> Trouble:
    """Those hops die; by then there are other peers."""

    async def trouble(swarm: Swarm, session: Session) -> None:
        await swarm.start(*instead)
        swarm.kill(session, *hops)

    return trouble


SPLIT = ("0:2", "2:4", "4:6")
