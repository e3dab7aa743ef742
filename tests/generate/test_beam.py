"""Beam sampling: distribution of the draws, their number, and the scores of the beams."""

import pytest
import torch

from lapilli.config.generation import SamplingParams
from lapilli.generate.beam import draw_several, warp_keeping
from lapilli.generate.reference import generate
from tests.generate.conftest import VOCABULARY

PROMPT = [4, 5, 9]
SCORES = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5]])


@pytest.mark.slow
def test_drawn_places_differ_and_follow_their_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.zeros(5, 5)
    number = 4000
    for _ in range(number):
        values, places = draw_several(SCORES, 2, [generator])
        assert torch.equal(values, SCORES.gather(-1, places))
        assert values[0, 0] >= values[0, 1]
        first, second = sorted(places[0].tolist())
        pairs[first, second] += 1
    assert pairs.diagonal().sum() == 0
    p = SCORES[0].softmax(0)
    in_order = p[:, None] * p[None] / (1 - p[:, None])  # first one, then another of what is left
    expected = torch.triu(in_order + in_order.T, diagonal=1)
    torch.testing.assert_close(pairs / number, expected, atol=0.025, rtol=0)


def test_every_beam_keeps_enough_tokens_to_go_on() -> None:
    params = SamplingParams(temperature=0.5, top_k=1, num_beams=2)
    warped = warp_keeping(SCORES.log_softmax(-1), 3, params)
    assert warped.isfinite().tolist() == [[True, False, True, False, True]]
    kept = warped.isfinite()
    assert torch.equal(warped[kept], (SCORES.log_softmax(-1) / 0.5)[kept])


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_sampled_beam_is_scored_by_the_model(model, oracle, tokenizer, fused, penalty) -> None:
    seen = set()
    for seed in range(6):
        params = SamplingParams(
            max_new_tokens=6, num_beams=3, temperature=1.0, length_penalty=penalty, seed=seed
        )
        [answer] = generate(model, fused(PROMPT), params, tokenizer=tokenizer, eos_ids=(3, 17))
        ids = torch.tensor([[*PROMPT, *answer.token_ids]])
        with torch.no_grad():
            logprobs = oracle(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        expected = logprobs[range(len(answer.token_ids)), list(answer.token_ids)].sum()
        expected = expected / len(answer.token_ids) ** penalty
        assert answer.score == pytest.approx(float(expected), rel=1e-4)
        seen.add(answer.token_ids)
    assert len(seen) > 1


def test_near_zero_temperature_is_plain_beam_search(model, tokenizer, fused) -> None:
    options = {"max_new_tokens": 8, "num_beams": 4, "stop_token_ids": (17, 40)}
    [plain] = generate(model, fused(PROMPT), SamplingParams(**options), tokenizer=tokenizer)
    params = SamplingParams(**options, temperature=1e-6, seed=1, top_p=0.5)
    [cold] = generate(model, fused(PROMPT), params, tokenizer=tokenizer)
    assert cold.token_ids == plain.token_ids


@pytest.mark.slow
def test_beam_sampling_follows_the_seed(model, tokenizer, fused) -> None:
    def answer(seed: int) -> tuple[int, ...]:
        params = SamplingParams(max_new_tokens=8, num_beams=2, temperature=1.5, seed=seed)
        return generate(model, fused(PROMPT), params, tokenizer=tokenizer)[0].token_ids

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1
    assert all(0 <= token < VOCABULARY for token in answer(2))
