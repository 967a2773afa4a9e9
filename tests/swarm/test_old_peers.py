"""Peers that know less of codecs than the client, or do as they like."""

import asyncio
from dataclasses import dataclass

import msgspec
import pytest

from llmasos.client.session import Session
from llmasos.codec import pack
from llmasos.config import Codec
from llmasos.errors import MissingBlocksError
from llmasos.network import Stream
from llmasos.wire import Result, Step, decode, encode
from tests.swarm.chaotic import LOSSY, PAGES, SPLIT, Swarm, in_swarm, write, written


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
