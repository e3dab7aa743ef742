import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lapilli.config.generation import SamplingParams
from lapilli.generate.sampler import (
    choose,
    draw,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    penalize_repetition,
    report_logprobs,
    row_generators,
    warp,
)


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
    assert kept(filter_min_p(logits, 0.29)) == [True, True, True, False]
    assert kept(filter_min_p(logits, 1.0)) == [True, False, False, False]


def test_draw_follows_the_probabilities():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    generators = row_generators(1, 0, torch.device("cpu"))
    counts = torch.zeros(3)
    for _ in range(3000):
        counts[draw(logits, generators)] += 1
    torch.testing.assert_close(counts / 3000, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


@given(st.integers(0, 50), st.integers(1, 4))
def test_a_row_draws_the_same_in_any_company(seed: int, company: int):
    logits = torch.randn(1, 30)
    alone = draw(logits, row_generators(1, seed, logits.device))
    crowd = torch.cat([torch.randn(company, 30), logits])
    assert draw(crowd, row_generators(company + 1, seed, logits.device))[-1] == alone[0]


def test_choose_is_greedy_at_temperature_zero():
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    assert choose(logits, SamplingParams(), []).tolist() == [1]
    seen = torch.tensor([[False, True, False]])
    params = SamplingParams(repetition_penalty=2.0)
    assert choose(logits, params, [], seen=seen).tolist() == [2]


@pytest.mark.parametrize("alternatives", [0, 2, 99])
def test_report(alternatives: int):
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).log()
    first, second = report_logprobs(logits, [1, 2], alternatives)
    assert first.logprob == pytest.approx(torch.tensor(0.3).log().item())
    assert len(first.top) == min(alternatives, 3)
    if alternatives:
        assert first.top[0] == (0, pytest.approx(torch.tensor(0.5).log().item()))
        assert second.top[0] == (2, pytest.approx(second.logprob))
