"""A draft model makes texts come in fewer steps, and changes none."""

from pathlib import Path

import pytest

from llmasos.blocks.registry import ModelSpec, load_tokenizer
from llmasos.client.draft import DraftModel, DraftText
from llmasos.config import ClientConfig
from llmasos.errors import UsageError
from tests.checkpoints import make_checkpoint
from tests.swarm.conftest import torch_swarm
from tests.swarm.test_generation import SPLITS, TEXT

NEW_TOKENS = 40


async def written(spec: ModelSpec, draft: str, temperature: float) -> tuple[tuple[int, ...], int]:
    """The tokens behind some prose, and how many passes the first peer needed for them."""
    config = ClientConfig(speculate=bool(draft), draft_model=draft)
    async with torch_swarm(spec, SPLITS[2], config=config) as (client, peers):
        result = await client.generate(TEXT[:150], max_new_tokens=NEW_TOKENS, temperature=temperature, seed=5)
        return result.token_ids, peers[0].engine.passes


@pytest.fixture
def babbler(tmp_path: Path, smollm2: ModelSpec) -> str:
    """A model with the same vocabulary and random weights."""
    folder = make_checkpoint(tmp_path / "babbler", "llama", vocab_size=smollm2.vocab_size)
    load_tokenizer(smollm2).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_a_good_draft_saves_steps_and_changes_no_text(temperature: float, smollm2: ModelSpec) -> None:
    plain, plain_passes = await written(smollm2, "", temperature)
    drafted, passes = await written(smollm2, "smollm2", temperature)
    assert drafted == plain
    assert plain_passes >= NEW_TOKENS
    # It is the same model, and takes as long: whether guessing goes on behind the first try is for the clock to say.
    assert passes <= plain_passes - (2 if temperature == 0.0 else 0)


async def test_a_bad_draft_changes_no_text_and_is_soon_given_up(smollm2: ModelSpec, babbler: str) -> None:
    plain, plain_passes = await written(smollm2, "", 0.0)
    drafted, passes = await written(smollm2, babbler, 0.0)
    assert drafted == plain
    assert passes <= plain_passes + 2


def test_another_vocabulary_is_refused(tmp_path: Path, smollm2: ModelSpec) -> None:
    folder = make_checkpoint(tmp_path / "stranger", "llama", vocab_size=smollm2.vocab_size)
    tokenizer = load_tokenizer(smollm2)
    tokenizer.add_tokens(["<another one>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match="different vocabularies"):
        DraftModel(str(folder), load_tokenizer(smollm2))


def test_a_draft_reads_along_wherever_the_text_turns(smollm2: ModelSpec) -> None:
    tokenizer = load_tokenizer(smollm2)
    model = DraftModel("smollm2", tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    text = DraftText(model)
    text.extend(ids[:30])
    text.read()
    first = text.guess(5)
    text.extend([*first[:2], ids[0]])  # two came true
    second = text.guess(4)
    afresh = DraftText(model)
    afresh.extend([*ids[:30], *first[:2], ids[0]])
    assert afresh.guess(4) == second
    assert len(first) == 5
    afresh.extend([ids[1]] * smollm2.context_tokens)
    assert afresh.guess(1) == [], "the text is longer than the draft model reads"
    model.close()
