"""Logits to tokens: filters and penalties against the transformers library, and by hand."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lapilli.config.generation import SamplingParams
from lapilli.errors import GenerationError
from lapilli.generate.sampler import (
    FILTERS,
    PROCESSORS,
    LogitsProcessors,
    Sampler,
    SamplingState,
    active_processors,
    draw,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    new_generator,
    penalize_repetition,
    report_logprobs,
    warp,
)

CPU = torch.device("cpu")


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 1),
    min_p=st.none() | st.floats(0, 0.9),
)
def test_warping_equals_transformers(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids = torch.zeros(3, 1, dtype=torch.long)
    torch.testing.assert_close(warp(logits, params), warpers(ids, logits))


def test_repetition_penalty_equals_transformers():
    logits = torch.randn(2, 20)
    ids = torch.tensor([[1, 5, 5], [0, 2, 19]])
    seen = torch.zeros(2, 20, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, seen, 1.7), expected)


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda out: (out > -torch.inf).tolist()[0]  # noqa: E731
    assert kept(filter_top_k(logits, 2)) == [True, True, False, False]
    assert kept(filter_top_k(logits, 99)) == [True] * 4
    assert kept(filter_top_p(logits, 0.79)) == [True, True, False, False]
    assert kept(filter_top_p(logits, 0.81)) == [True, True, True, False]
    assert kept(filter_top_p(logits, 1e-6)) == [True, False, False, False]
    assert kept(filter_top_p(logits, 1e-9)) == [True, False, False, False]  # 1 - 1e-9 rounds to 1
    assert kept(filter_min_p(logits, 0.29)) == [True, True, True, False]
    assert kept(filter_min_p(logits, 1.0)) == [True, False, False, False]


def test_draw_follows_the_probabilities():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    generators = [new_generator(0, CPU)]
    counts = torch.zeros(3)
    for _ in range(3000):
        counts[draw(logits, generators)] += 1
    torch.testing.assert_close(counts / 3000, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


@given(st.integers(0, 50), st.integers(1, 4))
def test_draws_of_a_row_do_not_depend_on_other_rows(seed: int, company: int):
    logits = torch.randn(1, 30)
    alone = draw(logits, [new_generator(seed, CPU)])
    crowd = torch.cat([torch.randn(company, 30), logits])
    assert draw(crowd, [new_generator(seed, CPU) for _ in range(company + 1)])[-1] == alone[0]


def state(prompt=(), vocab_size: int = 4, **options: object) -> SamplingState:
    params = SamplingParams.from_options(**options)
    return SamplingState(params, vocab_size, CPU, prompt_ids=prompt)


@given(st.integers(0, 300), st.sampled_from([1e-12, 1e-9, 1e-8, 6e-8, 1e-4]))
def test_any_top_p_keeps_the_best_token(seed: int, p: float):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 9)
    kept = filter_top_p(logits, p) > -torch.inf
    assert kept.gather(-1, logits.argmax(-1, keepdim=True)).all()
    params = SamplingParams(temperature=1.0, top_p=p)
    drawn = draw(warp(logits, params), [new_generator(seed, CPU) for _ in range(3)])
    assert torch.equal(drawn, logits.argmax(-1))


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.bfloat16)
    assert Sampler(logits).sample(0, state()) == (1, None)
    assert Sampler(logits).sample(0, state(prompt=[1], repetition_penalty=2.0))[0] == 2


def test_bias_and_repetition_equal_transformers():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 5]])
    bias = {1: 2.5, 7: -100.0, 19: 0.5}
    expected = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
            RepetitionPenaltyLogitsProcessor(1.7),
        ]
    )(ids, logits.clone())
    params = SamplingParams(repetition_penalty=1.7, logit_bias=bias)
    torch.testing.assert_close(LogitsProcessors(params, [[1, 5]], 20, CPU)(logits), expected)


def test_frequency_and_presence_count_the_answer_and_not_the_prompt():
    """OpenAI: logit - count * frequency_penalty - (count > 0) * presence_penalty."""
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    processors = LogitsProcessors(params, [[3], [3]], 4, CPU)
    for tokens in ([0, 1], [0, 2], [1, 2]):
        processors.push(torch.tensor(tokens))
    expected = torch.tensor([[-1.25, -0.75, 0.0, 0.0], [0.0, -0.75, -1.25, 0.0]])
    torch.testing.assert_close(processors(torch.zeros(2, 4)), expected)
    processors.take([1])
    torch.testing.assert_close(processors(torch.zeros(1, 4)), expected[1:])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0, 0, 0]),
        ({"frequency_penalty": 1.0}, [0, 1, 0, 2]),
        ({"presence_penalty": 1.5}, [0, 1, 2, 3]),
        ({"presence_penalty": -1.0}, [0, 0, 0, 0]),
        ({"logit_bias": {3: 2.0}}, [3, 3, 3, 3]),
        ({"logit_bias": {0: -100}}, [1, 1, 1, 1]),
        ({"logit_bias": {0: -100}, "presence_penalty": 1.0}, [1, 2, 3, 1]),
    ],
)
def test_greedy_follows_every_option(options, expected):
    logits = torch.tensor([[3.0, 2.5, 2.0, 1.6]])
    mine = state(**options)
    assert [Sampler(logits).sample(0, mine)[0] for _ in range(4)] == expected


def test_every_option_is_in_one_table():
    """What no table has must be decided by the loop: it would change nothing here."""
    of_the_loop = {
        *("max_new_tokens", "num_beams", "length_penalty", "stop", "stop_token_ids"),
        *("temperature", "seed", "logprobs", "grammar"),
    }
    names = {field.name for field in fields(SamplingParams)}
    assert names == {*PROCESSORS, *FILTERS, *of_the_loop}
    assert active_processors(SamplingParams(presence_penalty=0.1)) == ["presence_penalty"]
    assert active_processors(SamplingParams()) == []


def test_a_bias_for_a_token_that_does_not_exist_is_refused():
    with pytest.raises(GenerationError, match="logit_bias names token 4, the model has tokens 0"):
        state(logit_bias={4: 1.0})


@pytest.mark.parametrize("alternatives", [0, 2, 99])
def test_logprobs_of_a_token_and_its_alternatives(alternatives: int):
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).log()
    first, second = report_logprobs(logits, [1, 2], alternatives)
    assert first.logprob == pytest.approx(torch.tensor(0.3).log().item())
    assert len(first.top) == min(alternatives, 3)
    if alternatives:
        assert first.top[0] == (0, pytest.approx(torch.tensor(0.5).log().item()))
        assert second.top[0] == (2, pytest.approx(second.logprob))
