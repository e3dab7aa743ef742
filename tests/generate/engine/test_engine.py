"""The engine's answers are those of `generate` for each request alone, whatever else goes on."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.config.model import RopeScaling
from lapilli.errors import (
    BusyError,
    ContextTooLongError,
    FusionError,
    GenerationError,
    MediaCountMismatchError,
    ModelFailedError,
    UnsupportedModelError,
)
from lapilli.generate.engine import Engine, EngineOptions
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import (
    CONFIG,
    MPT,
    SMALL,
    VOCABULARY,
    alone,
    build,
    picture,
    request_of,
)

TOKENS = st.integers(1, VOCABULARY - 1)
PICTURES = st.tuples(st.integers(0, 2), st.integers(1, 9))  # number and length
PARTS = st.lists(TOKENS | PICTURES, min_size=1, max_size=6)
OPTIONS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 12)},
    optional={
        "temperature": st.sampled_from([0.7, 1.5]),
        "repetition_penalty": st.just(1.3),
        "logprobs": st.just(2),
        "stop_token_ids": st.just((7, 9, 30)),
        "stop": st.just((" w3",)),
    },
)


def built(parts, options, priority=0):
    """A request of drawn numbers: hypothesis forbids random tensors inside a strategy."""
    if "temperature" in options:
        options = {**options, "seed": 3}  # without a seed nobody can draw it again
    media = [part if isinstance(part, int) else picture(*part) for part in parts]
    return request_of(media, priority=priority, **options)


@pytest.mark.slow
@given(st.lists(st.tuples(PARTS, OPTIONS, st.integers(0, 2)), min_size=1, max_size=9))
@settings(max_examples=15, deadline=None)
def test_every_answer_is_that_of_a_solo_run(model, drawn):
    requests = [built(*numbers) for numbers in drawn]
    engine = Engine(model, WordTokenizer(), options=SMALL)
    for ours, request in zip(engine.run(requests), requests, strict=True):
        assert_same(ours, alone(model, request), model, request)
    assert engine.pool.available == engine.pool.capacity
    assert not engine.has_work


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        MPT,
        dataclasses.replace(CONFIG, sliding_window=5),
        dataclasses.replace(CONFIG, num_kv_heads=4),
        dataclasses.replace(CONFIG, rope_scaling=RopeScaling(kind="dynamic", factor=2.0)),
    ],
    ids=["mpt", "window", "one head each", "dynamic"],
)
def test_answers_of_other_families_are_those_of_solo_runs(config):
    model = build(config)
    engine = Engine(model, WordTokenizer(), options=SMALL)
    wanted = [
        request_of([5, picture(1, 9), 3, 4]),
        request_of([8]),
        request_of([5, picture(1, 9), 3, 9, 11], max_new_tokens=12),
        request_of(list(range(1, 30)), max_new_tokens=20),
    ]
    for _ in range(2):  # the second time from the prefix cache
        for ours, request in zip(engine.run(wanted), wanted, strict=True):
            assert_same(ours, alone(model, request), model, request)


@pytest.mark.slow
def test_sampling_without_a_seed_follows_the_global_generator(model, tokenizer):
    def answer() -> tuple[int, ...]:
        torch.manual_seed(4)
        [found] = Engine(model, tokenizer, options=SMALL).run([request_of([3], temperature=1.0)])
        return found.token_ids

    assert answer() == answer()


def test_greedy_does_not_advance_the_global_generator(engine):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    engine.run([request_of([3])])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_more_requests_than_rows_and_blocks(model, tokenizer):
    options = dataclasses.replace(SMALL, kv_bytes=10 * 2 * 2 * 2 * 4 * 8 * 4)
    engine = Engine(model, tokenizer, options=options)
    assert engine.pool.capacity == 10
    wanted = [request_of([i, i + 1, i + 2], max_new_tokens=30) for i in range(1, 8)]
    for ours, request in zip(engine.run(wanted), wanted, strict=True):
        assert_same(ours, alone(model, request), model, request)


@pytest.mark.slow
def test_end_token_of_the_model(model):
    [free] = Engine(model, WordTokenizer(), options=SMALL).run([request_of([3, 4])])
    end = free.token_ids[2]
    for engine in (
        Engine(model, WordTokenizer(), eos_ids=(end,), options=SMALL),
        Engine(model, WordTokenizer(eos_id=end), options=SMALL),
    ):
        [answer] = engine.run([request_of([3, 4])])
        assert answer.finish_reason == "stop"
        assert answer.token_ids == free.token_ids[: len(answer.token_ids)]


def test_answer_ends_with_the_context(model, tokenizer):
    engine = Engine(model, tokenizer, context_length=10, options=SMALL)
    [answer] = engine.run([request_of([1, 2, 3, 4, 5, 6, 7], max_new_tokens=50)])
    assert len(answer.token_ids) == 3
    assert answer.finish_reason == "length"
    with pytest.raises(ContextTooLongError, match="has 10 tokens"):
        engine.submit(request_of(list(range(1, 11))))


@pytest.mark.slow
def test_stream_is_the_answer_in_pieces(engine, model):
    request = request_of([3, picture(2), 9], max_new_tokens=12)
    pieces = list(engine.stream(request))
    expected = alone(model, request)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert tuple(i for piece in pieces for i in piece.token_ids) == expected.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"


def test_closed_stream_gives_its_blocks_back(engine):
    pieces = engine.stream(request_of([3], max_new_tokens=50))
    next(pieces)
    assert engine.has_work
    pieces.close()
    assert not engine.has_work
    assert engine.pool.available == engine.pool.capacity


@pytest.mark.slow
def test_a_cancelled_request_keeps_its_text(engine, model):
    long, other = request_of([3], max_new_tokens=50), request_of([4], max_new_tokens=20)
    first, second = engine.submit(long), engine.submit(other)
    for _ in range(5):
        engine.step()
    first.cancel()
    while engine.step():
        pass
    assert first.generation.finish_reason == "cancelled"
    assert first.generation.token_ids == alone(model, long).token_ids[:5]
    assert first.take().finish_reason == "cancelled"
    assert_same(second.generation, alone(model, other), model, other)


def test_cancelled_before_it_began(engine):
    handle = engine.submit(request_of([3]))
    handle.cancel()
    assert not engine.step()
    assert handle.generation.token_ids == ()


def test_higher_priority_goes_first(model, tokenizer):
    engine = Engine(model, tokenizer, options=dataclasses.replace(SMALL, max_rows=1))
    low, high = (engine.submit(request_of([3], priority=p)) for p in (0, 5))
    while not high.is_finished:
        engine.step()
    assert not low.is_finished
    assert low.take() is None


def test_a_long_prompt_does_not_stall_a_decoding_sequence(engine):
    growing = engine.submit(request_of([3], max_new_tokens=40))
    engine.step()
    growing.take()
    long = engine.submit(request_of(list(range(1, 60))))
    steps = 0
    while long.take() is None:
        engine.step()
        assert growing.take() is not None  # a token in every step
        steps += 1
    assert steps == 10  # 59 positions, 6 at a time


def test_one_medium_is_encoded_per_step_while_another_sequence_decodes(engine, model):
    growing = engine.submit(request_of([3], max_new_tokens=40))
    engine.step()
    vectors = model.modality("vector")
    seen = vectors.items_seen
    several = engine.submit(request_of([picture(i, 1) for i in range(20, 23)]))
    for looks in (1, 2, 3):
        engine.step()
        assert vectors.items_seen == seen + looks
    assert several.take() is not None
    growing.cancel()


def test_a_request_with_wrong_media_fails_alone(engine, model):
    good = request_of([3, picture(1)])
    bad = dataclasses.replace(good, media=(picture(1, 4),))
    handle = engine.submit(good)
    with pytest.raises(FusionError, match="the span has 3 positions, the item takes 4"):
        engine.submit(bad)
    while engine.step():
        pass
    assert_same(handle.generation, alone(model, good), model, good)
    with pytest.raises(FusionError):
        engine.run([bad])


def test_a_modality_with_wrong_features_fails_its_request_alone(engine, model, monkeypatch):
    good, bad = request_of([3, 4]), request_of([3, picture(77)])
    embed = type(model.modality("vector")).embed

    def one_less(self, items):
        return [features[1:] for features in embed(self, items)]

    monkeypatch.setattr(type(model.modality("vector")), "embed", one_less)
    handles = [engine.submit(request) for request in (good, bad)]
    while engine.step():
        pass
    assert_same(handles[0].generation, alone(model, good), model, good)
    with pytest.raises(FusionError, match="has 3 positions of width 32, the features are"):
        _ = handles[1].generation
    with pytest.raises(FusionError):
        handles[1].take()
    assert engine.pool.available == engine.pool.capacity


def test_failing_model_fails_the_step_and_not_the_engine(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, options=SMALL)
    handle = engine.submit(request_of([3]))

    def out_of_memory(*_, **__):
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(model.language_model, "logits", out_of_memory)
        with pytest.raises(RuntimeError, match="no memory left"):
            engine.step()
    with pytest.raises(ModelFailedError, match="the model failed: no memory left"):
        _ = handle.generation
    [answer] = engine.run([request_of([3])])
    assert_same(answer, alone(model, request_of([3])), model, request_of([3]))


def test_invalid_requests_are_refused(engine, model, tokenizer):
    with pytest.raises(GenerationError, match=r"num_beams 3.*leave it at 1"):
        engine.submit(request_of([3], num_beams=3))
    with pytest.raises(GenerationError, match="no tokens"):
        engine.submit(request_of([]))
    with pytest.raises(MediaCountMismatchError, match="1 places for media but 0"):
        engine.submit(dataclasses.replace(request_of([picture(1)]), media=()))
    small = Engine(model, tokenizer, options=dataclasses.replace(SMALL, kv_bytes=1 << 12))
    with pytest.raises(
        GenerationError, match=r"the answer may have .*memory for .*a shorter answer"
    ):
        small.submit(request_of([3, 4, 5], max_new_tokens=50))
    with pytest.raises(GenerationError, match="less than one block of 4 positions"):
        Engine(model, tokenizer, options=dataclasses.replace(SMALL, kv_bytes=10))
    with pytest.raises(GenerationError, match="chunk must be a whole number"):
        EngineOptions(chunk=0)
    with pytest.raises(GenerationError, match="kv_dtype must be"):
        EngineOptions(kv_dtype="int4")


def test_the_options_bound_the_context(model, tokenizer):
    """The shorter one of the argument and the options counts."""
    options = dataclasses.replace(SMALL, context_length=12)
    engine = Engine(model, tokenizer, options=options)
    assert engine.context_length == 12
    assert Engine(model, tokenizer, options=options, context_length=8).context_length == 8
    assert Engine(model, tokenizer, options=options, context_length=13).context_length == 12
    with pytest.raises(ContextTooLongError, match="together may have 12"):
        engine.submit(request_of([3] * 12))


@pytest.mark.slow
def test_waiting_requests_are_bounded(model, tokenizer):
    engine = Engine(model, tokenizer, options=dataclasses.replace(SMALL, max_waiting=2))
    for _ in range(2):
        engine.submit(request_of([3]))
    with pytest.raises(BusyError, match="2 requests are waiting"):
        engine.submit(request_of([3]))
    assert len(engine.run([request_of([i]) for i in range(1, 9)])) == 8


@pytest.mark.slow
def test_as_completed_hands_out_errors_and_takes_requests_lazily(engine, model):
    taken = []

    def requests():
        for i in range(20):
            taken.append(i)
            yield request_of([i + 1] * (200 if i == 3 else 1), max_new_tokens=2 + i % 4)

    found = {}
    for number, answer in engine.as_completed(requests()):
        found[number] = answer
        assert len(taken) <= len(found) + 2 * SMALL.max_rows
    assert sorted(found) == list(range(20))
    assert isinstance(found.pop(3), ContextTooLongError)
    for number, answer in found.items():
        request = request_of([number + 1], max_new_tokens=2 + number % 4)
        assert_same(answer, alone(model, request), model, request)


def test_as_completed_left_early_cancels(engine):
    answers = engine.as_completed(request_of([i], max_new_tokens=9) for i in range(1, 9))
    next(answers)
    answers.close()
    assert not engine.has_work
    assert engine.pool.available == engine.pool.capacity


def test_foreign_language_models_are_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model.language_model), "supports_varlen", False)
    with pytest.raises(UnsupportedModelError, match="use generate"):
        Engine(model, tokenizer)
