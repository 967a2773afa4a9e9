"""Rows travel packed, peers are lost, and what comes out are the very bits of the run in which nobody was."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from llmasos.blocks.registry import ModelSpec
from llmasos.client.generation import Generation, GenerationRequest
from llmasos.client.router import Router
from llmasos.client.session import Session
from llmasos.codec import pack, unpack
from llmasos.config import ClientConfig, Codec, DType, PeerConfig
from llmasos.errors import MissingBlocksError, UsageError
from llmasos.network import Handler, Stream
from llmasos.peer.handler import Served
from llmasos.peer.peer import Peer
from llmasos.peer.runner import Chunk, Fault, Speed
from llmasos.routing.directory import Directory
from llmasos.routing.planner import RouteRequest
from llmasos.span import Span
from llmasos.wire import PROTOCOL, Result, Step, Tensor, decode, encode
from sim.loop import run
from sim.network import SimSwarm
from tests.swarm.conftest import torch_swarm
from tests.swarm.test_generation import TEXT

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


@dataclass(eq=False)
class OldStream:
    """A stream as a peer sees it that was written before there were codecs: what it does not know, it ignores."""

    inner: Stream

    @property
    def peer(self) -> str:
        return self.inner.peer

    async def send(self, frame: bytes) -> None:
        await self.inner.send(without(frame, "opened", "codecs"))

    async def receive(self) -> bytes:
        frame = without(await self.inner.receive(), "open", "codec")
        message = decode(frame)
        assert not isinstance(message, Step) or message.hidden.codec == "exact", "an old peer cannot read this"
        return frame

    async def close(self) -> None:
        await self.inner.close()


class PackingStream(OldStream):
    """A peer that packs its answers although nobody asked for that."""

    async def send(self, frame: bytes) -> None:
        message = decode(frame)
        if isinstance(message, Result):
            frame = encode(Result(step=message.step, hidden=pack(message.hidden, "int8")))
        await self.inner.send(frame)

    async def receive(self) -> bytes:
        return await self.inner.receive()


def without(frame: bytes, kind: str, field: str) -> bytes:
    fields = msgspec.msgpack.decode(frame[1:])
    if fields["type"] == kind:
        fields.pop(field, None)
    return frame[:1] + msgspec.msgpack.encode(fields)


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


def test_the_codecs_are_told_apart() -> None:
    """Else nothing below could fail: plain rows give what one machine gives, and each codec something of its own."""
    whole, plain, *lossy = (written("exact", "0:6"), *(written(codec, *SPLIT) for codec in ("exact", *LOSSY)))
    assert plain == whole
    assert all(len(set(answers)) == 3 for answers in zip(plain, *lossy, strict=True))


@pytest.mark.parametrize("codec", LOSSY)
def test_rows_are_packed_on_the_way_into_each_hop(codec: Codec) -> None:
    """And not on the way back: what comes out is what the blocks make of rows that were rounded three times."""

    async def by_hand() -> bytes:
        rows = tensor(prompt())
        for span in map(Span.parse, SPLIT):
            (passed,) = await ChaoticRunner(span).run([Chunk("s", span, 0, unpack(pack(rows, codec)))])
            assert isinstance(passed, Tensor)
            rows = passed
        return floats(rows)[-1].tobytes()

    assert written(codec, *SPLIT)[0] == run(by_hand())


@pytest.mark.parametrize("codec", ["exact", *LOSSY])
@pytest.mark.parametrize(
    "trouble",
    [
        {0: lose(1, instead=["2:4"])},
        {3: lose(0, instead=["0:2"])},
        {5: lose(1, instead=["2:4"])},
        {8: lose(2, instead=["4:6"])},
        {5: lose(1, instead=["2:4"]), 12: lose(2, instead=["4:6"]), 20: lose(0, 1, instead=["0:2", "2:4"])},
        {4: lose(0, 1, 2, instead=SPLIT)},
        {6: lose(1, instead=["2:3", "3:4"])},  # a boundary where there was none
        {6: lose(1, 2, instead=["2:6"])},  # one less: a peer that takes both places
        {6: lose(0, 1, instead=["0:4", "1:4"]), 15: lose(0, instead=["0:1", "1:6"])},
    ],
    ids=["before the prompt", "first", "middle", "last", "one by one", "all", "into two", "into one", "and again"],
)
def test_a_failover_changes_no_bit(codec: Codec, trouble: dict[int, Trouble]) -> None:
    assert written(codec, *SPLIT, trouble=trouble) == written(codec, *SPLIT)


@pytest.mark.parametrize("codec", LOSSY)
def test_how_a_prompt_is_cut_changes_no_bit(codec: Codec) -> None:
    whole = written(codec, *SPLIT)
    assert written(codec, *SPLIT, prompt_chunk_tokens=7) == whole
    assert written(codec, *SPLIT, prompt_chunk_tokens=1) == whole


@pytest.mark.parametrize("codec", LOSSY)
def test_a_hop_that_drains_hands_over_every_bit(codec: Codec) -> None:
    async def drain(swarm: Swarm, session: Session) -> None:
        await swarm.start("2:4")
        going = session.route.hops[1].peer
        next(peer for peer in swarm.peers.values() if peer.network.peer_id == going).handler.drain()

    assert written(codec, *SPLIT, trouble={9: drain}) == written(codec, *SPLIT)


@pytest.mark.parametrize("codec", LOSSY)
def test_rows_that_the_client_relays_are_the_same(codec: Codec) -> None:
    async def part(swarm: Swarm, session: Session) -> None:
        swarm.world.partition(*session.route.peers[:2])

    assert written(codec, *SPLIT, trouble={7: part}) == written(codec, *SPLIT)


# --- beginnings that are computed once -------------------------------------------------------------------------------

PAGES = tuple(bytes([page]) * 16 for page in range(PROMPT_TOKENS // 64))


async def write_twice(swarm: Swarm, new_session: Callable[..., Session], trouble: dict[int, Trouble]) -> list[bytes]:
    """The same prompt in two sessions; the second one's answers."""
    async with new_session(PAGES) as session:
        await write(swarm, session)
    async with new_session(PAGES) as session:
        assert session.prefix_tokens == 64 * len(PAGES)
        session.begin_with(tensor(prompt()[: session.prefix_tokens]))
        return await write(swarm, session, trouble)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_failover_behind_a_shared_prefix_changes_no_bit(codec: Codec, lost: int) -> None:
    async def scenario(swarm: Swarm) -> list[bytes]:
        await swarm.start(*SPLIT)
        return await write_twice(swarm, await swarm.client(codec), {4: lose(lost, instead=[SPLIT[lost]])})

    assert in_swarm(scenario) == written(codec, *SPLIT)


def test_a_prefix_is_not_shared_between_routes_that_round_elsewhere() -> None:
    """The last peer holds what the first session computed: of other roundings than what the newcomers then hold."""

    async def scenario(swarm: Swarm) -> list[bytes]:
        await swarm.start("0:2", "2:6")
        new_session = await swarm.client("int8")
        async with new_session(PAGES) as session:
            await write(swarm, session)
            swarm.kill(session, 0)
        await swarm.start("0:1", "1:2")
        await asyncio.sleep(30)
        return await write_twice(swarm, new_session, {})

    assert in_swarm(scenario) == written("int8", "0:1", "1:2", "2:6")


def test_nor_is_what_was_named_before_the_route_was_known() -> None:
    """A hop hangs while the session is opened, and two come in its place: the prompt is named anew on the others."""

    async def scenario(swarm: Swarm) -> list[bytes]:
        await swarm.start("0:2", "2:6")
        new_session = await swarm.client("int8")
        async with new_session() as session:  # the client gets to know them, before there are others
            hanging = session.route.hops[0].peer
            await session.forward(tensor(prompt()))
        swarm.world.hang(hanging)
        await swarm.start("0:1", "1:2")
        async with new_session(PAGES) as session:
            assert len(session.route.hops) == 3
            await write(swarm, session)
            swarm.world.heal()
            swarm.kill(session, 0, 1)
        await asyncio.sleep(60)
        return await write_twice(swarm, new_session, {})

    assert in_swarm(scenario) == written("int8", "0:2", "2:6")


# --- peers that know less --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", LOSSY)
def test_a_peer_that_knows_no_codec_is_spoken_to_in_plain_rows(codec: Codec) -> None:
    """And so are those beside it; the others pack."""

    async def scenario(swarm: Swarm) -> tuple[list[bytes], int]:
        await swarm.start("0:1", "1:2", "3:6")
        await swarm.start("2:3", through=OldStream)
        async with (await swarm.client(codec))(PAGES) as session:
            return await write(swarm, session), session.failovers

    async def without_it(swarm: Swarm) -> list[bytes]:
        await swarm.start("0:1", "1:6")
        async with (await swarm.client(codec))() as session:
            return await write(swarm, session)

    assert in_swarm(scenario) == (in_swarm(without_it), 0)  # packed before the blocks 0 and 1, and nowhere else


def test_one_that_knows_no_codec_takes_over_no_hop_that_needs_it() -> None:
    async def scenario(swarm: Swarm) -> list[bytes]:
        async def trouble(swarm: Swarm, session: Session) -> None:
            await swarm.start("2:4", through=OldStream)
            swarm.kill(session, 1)
            await asyncio.sleep(1)
            asyncio.get_running_loop().call_later(10, lambda: later.append(asyncio.ensure_future(swarm.start("2:4"))))

        later: list[asyncio.Future[None]] = []
        await swarm.start(*SPLIT)
        async with (await swarm.client("int8"))() as session:
            answers = await write(swarm, session, {5: trouble})
        assert later
        return answers

    assert in_swarm(scenario) == written("int8", *SPLIT)


def test_where_there_is_nobody_else_the_blocks_are_missing() -> None:
    async def old_instead(swarm: Swarm, session: Session) -> None:
        await swarm.start("2:4", through=OldStream)
        swarm.kill(session, 1)

    with pytest.raises(MissingBlocksError, match="2:4"):
        written("int8", *SPLIT, trouble={5: old_instead}, wait_for_blocks_s=3.0)


def test_answers_are_plain_or_not_taken() -> None:
    async def scenario(swarm: Swarm) -> tuple[list[bytes], int]:
        await swarm.start("0:2", "2:4")
        await swarm.start("4:6", through=PackingStream)
        async with (await swarm.client("int8"))() as session:
            await swarm.start("4:6")
            return await write(swarm, session), session.failovers

    assert in_swarm(scenario) == (written("int8", *SPLIT), 1)


def test_a_codec_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no codec 'int3'"):
        written("int3", *SPLIT)  # type: ignore[arg-type]


# --- real blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", LOSSY)
async def test_the_text_goes_on_as_it_would_have(codec: Codec, smollm2: ModelSpec) -> None:
    async with torch_swarm(smollm2, ["0:9", "9:20", "9:20", "20:30"], config=ClientConfig(codec=codec)) as (
        client,
        peers,
    ):
        text = TEXT[:900]
        undisturbed = await client.generate(text, max_new_tokens=40)
        generator = await client.generator("smollm2")
        ids = await generator.encode(text)
        pieces = []
        async with client.dialogue("smollm2", len(ids) + 40, new_tokens=40, prompt_ids=ids) as dialogue:
            async for piece in generator.run(GenerationRequest(text, max_new_tokens=40), dialogue, ids, 40):
                pieces.append(piece)
                if len(pieces) == 5:
                    hop = dialogue.session.route.hops[1].peer
                    await next(peer for peer in peers if peer.network.peer_id == hop).handler.cut_off()
        result = pieces[-1]
        assert isinstance(result, Generation)
        assert (result.failovers, result.token_ids) == (1, undisturbed.token_ids)
