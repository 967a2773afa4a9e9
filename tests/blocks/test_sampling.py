"""Sampling is that of transformers' generate, token for token."""

from typing import Any

import pytest
import torch

from llmasos.blocks.sampling import Sampler, SamplingParams, score
from llmasos.errors import UsageError
from tests.blocks.conftest import Session, tokens
from tests.checkpoints import VOCAB

SETTINGS = [
    {"temperature": 0.8},
    {"temperature": 1.7, "top_k": 11},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.5, "top_p": 0.9, "top_k": 23, "repetition_penalty": 1.4},
    {"temperature": 0.0, "repetition_penalty": 1.6},
    {"temperature": 1.3, "min_p": 0.07},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_equal_those_of_generate(settings: dict[str, Any], split_model: Any) -> None:
    split = split_model("qwen3")
    prompt, asked = tokens(9), 14
    sampled = settings["temperature"] > 0
    options = {"top_k": 0, "top_p": 1.0, **settings} if sampled else {"repetition_penalty": 1.0, **settings}
    if not sampled:
        del options["temperature"]
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        wanted = split.reference.generate(
            torch.tensor([prompt]), max_new_tokens=asked, do_sample=sampled, eos_token_id=None, **options
        )[0]
    sampler, session, ids = Sampler(SamplingParams(**settings, seed=1234)), Session(split), list(prompt)
    logits = session.step(ids)
    for _ in range(asked):
        ids.append(sampler(ids, logits[-1]))
        logits = session.step(ids[-1:])
    assert ids == wanted.tolist()


def test_a_seed_repeats_and_the_global_random_state_is_left_alone() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    logits = torch.randn(VOCAB)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = Sampler(params), Sampler(params)
    draws = [first([], logits) for _ in range(20)]
    assert draws == [second([], logits) for _ in range(20)]
    assert len(set(draws)) > 5
    assert torch.equal(torch.get_rng_state(), before)
    unseeded = [Sampler(SamplingParams(temperature=1.0)) for _ in range(2)]
    assert [unseeded[0]([], logits) for _ in range(30)] != [unseeded[1]([], logits) for _ in range(30)]


def test_logits_are_not_changed() -> None:
    logits = torch.randn(VOCAB)
    kept = logits.clone()
    Sampler(SamplingParams(temperature=0.5, top_k=3, repetition_penalty=2.0, seed=1))([4, 5, 6], logits)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-9},
        {"repetition_penalty": float("inf")},
        {"seed": 2**64},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"logit_bias": ((3, float("inf")),)},
        {"logit_bias": ((-1, 1.0),)},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-5])
def test_hardly_any_temperature_is_greedy(temperature: float) -> None:
    """Scores divided by next to nothing are no numbers any more."""
    logits = torch.randn(VOCAB) * 30
    params = SamplingParams(temperature=temperature, repetition_penalty=0.01, seed=1)
    greedy = SamplingParams(temperature=0.0, repetition_penalty=0.01)
    assert Sampler(params)([3, 4], logits) == Sampler(greedy)([3, 4], logits)


def test_a_bias_makes_a_token_likely_or_impossible() -> None:
    logits = torch.randn(VOCAB)
    best = int(logits.argmax())
    assert Sampler(SamplingParams(logit_bias=((11, 100.0),)))([], logits) == 11
    assert Sampler(SamplingParams(logit_bias=((best, -100.0),)))([], logits) == int(logits.topk(2).indices[1])


def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt() -> None:
    logits = torch.zeros(VOCAB)
    logits[[3, 4, 5]] = torch.tensor([3.0, 2.5, 1.0])
    assert Sampler(SamplingParams(presence_penalty=1.0), prompt_tokens=2)([3, 3], logits) == 3
    assert Sampler(SamplingParams(presence_penalty=1.0), prompt_tokens=2)([3, 3, 3], logits) == 4
    once = Sampler(SamplingParams(frequency_penalty=0.4), prompt_tokens=1)
    assert once([9, 3], logits) == 3
    assert once([9, 3, 3], logits) == 4


def test_a_mask_is_obeyed_whatever_the_scores() -> None:
    logits = torch.randn(VOCAB)
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[6, 17]] = True
    greedy, drawn = Sampler(SamplingParams()), Sampler(SamplingParams(temperature=3.0, seed=1))
    assert greedy([], logits, allowed) == max((6, 17), key=lambda token: logits[token])
    assert {drawn([], logits, allowed) for _ in range(40)} == {6, 17}


def test_scores_are_log_probabilities() -> None:
    logits = torch.randn(3, VOCAB)
    wanted = torch.log_softmax(logits, dim=-1)
    scored = score(logits, [5, 8, 13], top=4)
    assert [one.token for one in scored] == [5, 8, 13]
    for row, one in enumerate(scored):
        assert one.logprob == pytest.approx(float(wanted[row, one.token]))
        assert [token for token, _ in one.top] == wanted[row].topk(4).indices.tolist()
    assert score(logits[:1], [2], top=0)[0].top == ()
