"""Rows travel packed, peers are lost, and what comes out are the very bits of the run in which nobody was."""

import pytest

from llmasos.blocks.registry import ModelSpec
from llmasos.client.generation import Generation, GenerationRequest
from llmasos.client.session import Session
from llmasos.codec import pack, unpack
from llmasos.config import ClientConfig, Codec
from llmasos.errors import UsageError
from llmasos.peer.runner import Chunk
from llmasos.span import Span
from llmasos.wire import Tensor
from sim.loop import run
from tests.swarm.chaotic import LOSSY, SPLIT, ChaoticRunner, Swarm, Trouble, floats, lose, prompt, tensor, written
from tests.swarm.conftest import torch_swarm
from tests.swarm.test_generation import TEXT


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


def test_a_codec_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no codec 'int3'"):
        written("int3", *SPLIT)  # type: ignore[arg-type]


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
