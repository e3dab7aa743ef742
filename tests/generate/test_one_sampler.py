"""Every path that generates tokens samples with Sampler.sample and follows every option.

There was an argmax of raw logits beside that function: an option added to the function was followed
by the plain loop and ignored by the engine's greedy rows.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.config.generation import SamplingParams
from lapilli.errors import GenerationError
from lapilli.generate.engine import Engine
from lapilli.generate.reference import generate, stream
from lapilli.generate.sampler import Sampler
from lapilli.generate.speculative import DraftModel
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import SMALL, alone, build, request_of

PROMPT = [3, 4, 9]
LENGTH = 12


@pytest.fixture(scope="module")
def model():
    return build()


def plain(model, **options: object) -> tuple[int, ...]:
    return alone(model, request_of(PROMPT, max_new_tokens=LENGTH, **options)).token_ids


def streamed(model, **options: object) -> tuple[int, ...]:
    request = request_of(PROMPT, max_new_tokens=LENGTH, **options)
    with torch.inference_mode():
        batch = model.embed_prompts([request.prompt], [()])
    pieces = stream(model, batch, request.params, tokenizer=WordTokenizer())
    return tuple(token for piece in pieces for token in piece.token_ids)


def by_engine(proposer=None, **changes: object):
    def answer(model, **options: object) -> tuple[int, ...]:
        settings = dataclasses.replace(SMALL, **{"speculate": "off", **changes})
        made = proposer and proposer(model)
        engine = Engine(model, WordTokenizer(), options=settings, proposer=made)
        request = request_of(PROMPT, max_new_tokens=LENGTH, **options)
        return engine.run([request, request])[1].token_ids

    return answer


PATHS = {
    "plain loop": plain,
    "stream": streamed,
    "engine": by_engine(),
    "verified drafts": by_engine(lambda model: DraftModel(model.language_model), speculate="on"),
    "static steps": by_engine(compile="static"),
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_samples_with_the_same_function(path, model, monkeypatch):
    first = PATHS[path](model)
    forbidden = set(first)
    sample = Sampler.__init__

    def forbidding(self, logits):
        logits = logits.clone()
        logits[:, sorted(forbidden)] = -torch.inf
        sample(self, logits)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__init__", forbidding)
        assert not forbidden & set(PATHS[path](model))
    sampled = []
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", lambda _, row, state: sampled.append(row) or (7, None))
        assert PATHS[path](model) == (7,) * LENGTH
    assert len(sampled) >= LENGTH


OPTIONS = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"logit_bias": {7: 30.0, 8: 30.0}},
    {"logit_bias": {7: 30.0, 8: 29.0}, "presence_penalty": 2.0, "repetition_penalty": 1.3},
    {"frequency_penalty": -2.0, "temperature": 0.8, "seed": 5, "top_p": 0.9},
]
MORE = [pytest.param(options, marks=pytest.mark.slow) for options in OPTIONS[1:]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [OPTIONS[0], *MORE], ids=str)
def test_every_path_follows_every_option(path, options, model):
    assert PATHS[path](model, **options) == plain(model, **options)
    assert plain(model, **options) != plain(model)


def test_bias_and_penalties_do_what_they_say(model):
    wanted = plain(model, logit_bias={7: 100.0})
    assert set(wanted) == {7}
    assert 7 not in plain(model, logit_bias={7: -100.0})
    both = plain(model, logit_bias={7: 60.0, 8: 60.0}, frequency_penalty=2.0)
    assert set(both) == {7, 8}
    free = plain(model, logit_bias={7: 60.0, 8: 60.0})
    assert max(map(both.count, (7, 8))) <= max(map(free.count, (7, 8)))


@pytest.mark.parametrize("beams", [1, 2])
def test_penalties_count_each_row_of_a_batch_alone(model, beams):
    params = SamplingParams(
        max_new_tokens=8, frequency_penalty=1.0, logit_bias={5: 4.0}, num_beams=beams
    )
    prompts = [[3], [4, 5], [9, 8, 7]]
    requests = [request_of(prompt) for prompt in prompts]
    with torch.inference_mode():
        batch = model.embed_prompts([one.prompt for one in requests], [()] * 3)
    together = generate(model, batch, params, tokenizer=WordTokenizer())
    for prompt, answer in zip(prompts, together, strict=True):
        request = dataclasses.replace(request_of(prompt), params=params)
        assert answer.token_ids == alone(model, request).token_ids


def test_beams_follow_a_bias(model):
    options = {"num_beams": 3, "logit_bias": {7: 100.0}}
    assert set(plain(model, **options)) == {7}
    assert len(set(plain(model, **options, frequency_penalty=2.0))) == 1  # 100 is more than 2 * 12
    close = {"num_beams": 3, "logit_bias": {7: 100.0, 8: 100.0}, "frequency_penalty": 2.0}
    assert set(plain(model, **close)) == {7, 8}


def test_a_bias_for_no_token_is_refused_by_every_path(model):
    for answer in PATHS.values():
        with pytest.raises(GenerationError, match="logit_bias names token 99"):
            answer(model, logit_bias={99: 1.0})
    with pytest.raises(GenerationError, match="logit_bias names token 99"):
        plain(model, logit_bias={99: 1.0}, num_beams=2)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "frequency_penalty": st.floats(-2, 2),
                "presence_penalty": st.floats(-2, 2),
                "logit_bias": st.dictionaries(st.integers(0, 60), st.floats(-9, 9), max_size=4),
                "repetition_penalty": st.just(1.3),
                "temperature": st.sampled_from([0.7, 1.5]),
                "stop_token_ids": st.just((7, 9)),
            },
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_any_options_in_any_batch_give_the_tokens_of_a_solo_run(model, drawn, has_drafts):
    requests = [
        request_of([at + 1, 2, 3], seed=11, max_new_tokens=9, **options)
        for at, options in enumerate(drawn)
    ]
    engine = Engine(
        model,
        WordTokenizer(),
        options=dataclasses.replace(SMALL, speculate="on" if has_drafts else "off"),
        proposer=DraftModel(model.language_model),
    )
    for ours, request in zip(engine.run(requests), requests, strict=True):
        theirs = alone(model, request)
        if request.params.temperature > 0 or not request.params.logit_bias:
            assert ours.token_ids == theirs.token_ids
        assert_same(ours, theirs, model, request)
