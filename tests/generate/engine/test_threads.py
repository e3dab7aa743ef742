"""One model in any number of threads: no wrong answer, and no thread waits for ever."""

import copy
import dataclasses
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import (
    FusionError,
    GenerationError,
    ModelFailedError,
    RequestError,
    UnsupportedModelError,
)
from lapilli.generate.engine import Engine, RequestHandle
from lapilli.generate.reference import lock_of
from lapilli.prompt.encode import EncodedPrompt, Span
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import SMALL, WIDTH, alone, picture, request_of

TINY = dataclasses.replace(SMALL, kv_bytes=14 * 2 * 2 * 2 * 4 * 8 * 4)
"""Room for 14 blocks: what was kept is evicted all the time."""


def in_threads(*works) -> None:
    """Run them at the same time; what one of them raises is raised here."""
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    if errors:
        raise errors[0]


ASKED = st.tuples(
    st.integers(1, 6),  # what it begins with: some begin alike
    st.integers(0, 2),  # picture
    st.integers(1, 9),  # new tokens
    st.sampled_from(["run", "stream", "cancel", "as completed"]),
)


@pytest.mark.slow
@given(
    st.lists(st.lists(ASKED, min_size=1, max_size=5), min_size=2, max_size=3),
    st.booleans(),
    st.sampled_from([SMALL, TINY]),
)
@settings(max_examples=6, deadline=None)
def test_every_answer_is_that_of_a_solo_run(model, asked, is_shared, options):
    """Threads that ask, stream and hang up, on one engine or on several of one model."""
    engines = [Engine(model, WordTokenizer(), options=options)]
    engines += [engines[0] if is_shared else Engine(model, WordTokenizer(), options=options)] * 2
    found = []

    def work(engine, mine):
        for first, number, length, how in mine:
            request = request_of([first, 9, picture(number), 4], max_new_tokens=length)
            if how == "run":
                found.extend((request, answer) for answer in engine.run([request, request]))
            elif how == "as completed":
                found.extend((request, answer) for _, answer in engine.as_completed([request]))
            else:
                pieces = engine.stream(request)
                if how == "cancel":
                    next(pieces)
                    pieces.close()
                else:
                    assert "".join(p.text for p in pieces) == pieces.generation.text
                found.append((request, pieces.generation))

    in_threads(
        *(lambda e=e, mine=mine: work(e, mine) for e, mine in zip(engines, asked, strict=False))
    )
    for request, answer in found:
        if answer.finish_reason == "cancelled":
            whole = alone(model, request)
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        else:
            assert_same(answer, alone(model, request), model, request)
    for engine in engines:
        assert not engine.has_work
        assert engine.pool.available == engine.pool.capacity


def test_engines_of_one_model_have_one_lock(model, tokenizer):
    first, second = (Engine(model, tokenizer, options=SMALL) for _ in range(2))
    assert first._lock is second._lock is lock_of(model.language_model)


@pytest.mark.slow
def test_a_waiting_thread_is_served_by_the_steps_of_another(engine, model):
    """Steps of a thread that does not end serve a stream in another one, piece by piece."""
    long = engine.submit(request_of([3], max_new_tokens=110))
    ends, request = threading.Event(), request_of([4], max_new_tokens=20)

    def step():
        while not ends.is_set():
            engine.step()

    def read():
        try:
            pieces = list(engine.stream(request))
            assert "".join(piece.text for piece in pieces) == alone(model, request).text
        finally:
            ends.set()

    in_threads(step, read)
    long.cancel()
    engine.step()


@pytest.mark.slow
def test_a_callback_that_raises_fails_no_request(engine, model, caplog):
    requests = [request_of([i, 5], max_new_tokens=6) for i in range(1, 5)]
    handles = [engine.submit(request) for request in requests]

    def wake():
        raise ValueError("mine")

    handles[0].wake = wake
    while engine.step():
        pass
    for handle, request in zip(handles, requests, strict=True):
        assert_same(handle.generation, alone(model, request), model, request)
    assert "RequestHandle.wake raised" in caplog.text
    for answer, request in zip(engine.run(requests), requests, strict=True):
        assert_same(answer, alone(model, request), model, request)


def test_a_callback_may_ask_and_be_interrupted(engine, model):
    """The engine is free when readers are woken, and an interrupt keeps nobody from it."""
    first, second = request_of([3], max_new_tokens=2), request_of([4], max_new_tokens=2)
    one, two = engine.submit(first), engine.submit(second)
    asked, woken = [], []

    def ask():
        if not asked:
            asked.append(engine.run([request_of([5, 6])])[0])
            raise KeyboardInterrupt

    one.wake, two.wake = ask, lambda: woken.append(1)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert woken
    while engine.step():
        pass
    assert_same(asked[0], alone(model, request_of([5, 6])), model, request_of([5, 6]))
    for handle, request in ((one, first), (two, second)):
        assert_same(handle.generation, alone(model, request), model, request)


def features(*shape: int, fill: float = 0.5) -> torch.Tensor:
    return torch.full(shape, fill)


GOOD = request_of([3, picture(1), 5])
PROMPT = GOOD.prompt


def altered(record, **changes):
    """A copy of a frozen record with values that its types forbid, as a program may have them."""
    record = copy.copy(record)
    for name, value in changes.items():
        object.__setattr__(record, name, value)
    return record


def ids(*found: object) -> EncodedPrompt:
    return altered(PROMPT, input_ids=list(found))


def spans(*found: Span) -> EncodedPrompt:
    return altered(PROMPT, spans=found)


MALFORMED = {
    "id beyond the vocabulary": (
        {"prompt": ids(3, 0, 0, 0, 10**6)},
        RequestError,
        "1000000 at place 4 is no token id",
    ),
    "negative id": (
        {"prompt": ids(-1, 0, 0, 0, 5)},
        RequestError,
        "-1 at place 0",
    ),
    "id that is no number": (
        {"prompt": ids("a", 0, 0, 0, 5)},
        RequestError,
        "'a' at place 0",
    ),
    "id of half a number": (
        {"prompt": ids(1.5, 0, 0, 0, 5)},
        RequestError,
        "1.5 at place 0",
    ),
    "no prompt": ({"prompt": [1, 2, 3]}, RequestError, "holds an EncodedPrompt"),
    "no params": ({"params": {"max_new_tokens": 3}}, RequestError, "and dict"),
    "seen ids": ({"seen_ids": [1, 61]}, RequestError, "seen_ids: 61 at place 1"),
    "priority": ({"priority": "high"}, RequestError, "priority must be a whole number"),
    "priority without order": ({"priority": float("nan")}, RequestError, "priority"),
    "span beyond the prompt": ({"prompt": spans(Span(0, 3, 3, "vector"))}, RequestError, "Span"),
    "negative span": ({"prompt": spans(Span(0, -1, 3, "vector"))}, RequestError, "Span"),
    "empty span": (
        {"prompt": spans(Span(0, 1, 0, "vector"))},
        FusionError,
        "the span has 0 positions, and features of this modality stand in the sequence",
    ),
    "spans over each other": (
        {
            "prompt": spans(Span(0, 1, 3, "vector"), Span(0, 2, 3, "vector")),
            "media": (picture(1), picture(2)),
        },
        RequestError,
        "may begin at 4",
    ),
    "modality": ({"prompt": spans(Span(0, 1, 3, "sound"))}, UnsupportedModelError, "'sound'"),
    "no medium": ({"media": ("a.png",)}, RequestError, "is a str, which its modality cannot count"),
    "medium of nothing": ({"media": (None,)}, RequestError, "is a NoneType"),
    "longer medium": ({"media": (picture(1, 4),)}, FusionError, "the item takes 4"),
    "wide features": ({"media": (features(3, WIDTH + 1),)}, FusionError, "width 32"),
    "flat features": ({"media": (features(3),)}, FusionError, "width 32"),
    "features of nan": (
        {"media": (features(3, WIDTH, fill=float("nan")),)},
        RequestError,
        "must be finite",
    ),
    "features of integers": (
        {"media": (torch.ones(3, WIDTH, dtype=torch.int64),)},
        RequestError,
        "must be finite floating point",
    ),
    "features of nothing": (
        {"media": (torch.empty(3, WIDTH, device="meta"),)},
        RequestError,
        "must be finite floating point",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_is_refused_at_once_and_fails_no_other(engine, model, kind):
    changes, error, text = MALFORMED[kind]
    good = request_of([7, picture(2)])
    handle = engine.submit(good)
    with pytest.raises(error, match=text):
        engine.submit(altered(GOOD, **changes))
    while engine.step():
        pass
    assert_same(handle.generation, alone(model, good), model, good)


def test_a_handle_is_for_one_request(engine):
    handle = engine.submit(request_of([3]))
    with pytest.raises(RequestError, match="submitted before"):
        engine.submit(handle.request, handle=handle)
    with pytest.raises(RequestError, match="made for another request"):
        engine.submit(request_of([3]), handle=RequestHandle(request_of([4])))
    engine.abort_all(GenerationError("over"))
    assert handle.error is not None
    assert not engine.has_work


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_outside_the_range_of_a_generator_are_refused(seed):
    with pytest.raises(GenerationError, match="seed"):
        request_of([3], temperature=1.0, seed=seed)


def test_logits_without_numbers_fail_their_request_alone(engine, model, monkeypatch):
    logits = model.language_model.logits

    def broken(hidden):
        scores = logits(hidden).clone()
        scores[0] = float("nan")
        return scores

    good, drawn = request_of([4], max_new_tokens=1), request_of([3], temperature=1.0, seed=1)
    monkeypatch.setattr(model.language_model, "logits", broken)
    bad = engine.submit(drawn)
    handle = engine.submit(good)
    while engine.step():
        pass
    with pytest.raises(ModelFailedError, match="no token can be chosen"):
        _ = bad.generation
    monkeypatch.undo()
    assert_same(handle.generation, alone(model, good), model, good)
    assert engine.pool.available == engine.pool.capacity


@pytest.mark.slow
def test_any_error_of_a_pass_fails_its_requests_and_not_the_engine(engine, model, monkeypatch):
    handle = engine.submit(request_of([3]))

    def broken(*_, **__):
        raise IndexError("anything")

    with monkeypatch.context() as patch:
        patch.setattr(model.language_model, "logits", broken)
        with pytest.raises(IndexError):
            engine.step()
        with pytest.raises(ModelFailedError, match="the model failed: anything"):
            engine.run([request_of([3])])
    assert handle.error is not None
    [answer] = engine.run([request_of([3])])
    assert_same(answer, alone(model, request_of([3])), model, request_of([3]))


def test_an_error_before_the_pass_fails_all_requests_once(engine, monkeypatch):
    handle = engine.submit(request_of([3]))

    def broken(*_, **__):
        raise OSError("anything")

    with monkeypatch.context() as patch:
        patch.setattr(engine.pool, "find", broken)
        with pytest.raises(OSError, match="anything"):
            engine.step()
    with pytest.raises(ModelFailedError, match="the engine failed: anything"):
        _ = handle.generation
    assert not engine.has_work
    assert engine.run([request_of([3])])


class Careless:
    """A proposer that fails at the third token, or guesses what is no token."""

    def __init__(self, guess) -> None:
        self.guess = guess

    def __call__(self):
        return self

    def propose(self, keys, most, is_worth):
        return self.guess(keys)


def fails(keys):
    raise ValueError("mine")


@pytest.mark.slow
@pytest.mark.parametrize("guess", [fails, lambda _: [10**6], lambda _: [-3], lambda _: ["a"]])
def test_a_faulty_proposer_loses_its_drafts_only(model, tokenizer, guess):
    options = dataclasses.replace(SMALL, speculate="on")
    engine = Engine(model, tokenizer, options=options, proposer=Careless(guess))
    request = request_of([3, 4], max_new_tokens=9)
    assert_same(engine.run([request])[0], alone(model, request), model, request)


def test_a_call_from_within_a_step_cannot_wait_for_the_engine(model, tokenizer, caplog):
    def asks(keys):
        engine.run([request_of([3])])

    options = dataclasses.replace(SMALL, speculate="on")
    engine = Engine(model, tokenizer, options=options, proposer=Careless(asks))
    request = request_of([3, 4], max_new_tokens=4)
    assert_same(engine.run([request])[0], alone(model, request), model, request)
    assert "in the middle of a step" in caplog.text


@pytest.mark.slow
def test_as_completed_waits_for_room(model, tokenizer):
    engine = Engine(model, tokenizer, options=dataclasses.replace(SMALL, max_waiting=1))
    answers = dict(engine.as_completed(request_of([i + 1]) for i in range(7)))
    assert not any(isinstance(answer, Exception) for answer in answers.values())


def test_a_stream_can_be_closed_from_another_thread(engine):
    """Whoever closes a stream may be another one than who reads it."""
    pieces = engine.stream(request_of([3], max_new_tokens=110))
    next(pieces)

    def read():
        list(pieces)

    def close():
        time.sleep(0.01)
        pieces.close()

    in_threads(read, close)
    assert pieces.generation.finish_reason == "cancelled"
    assert engine.pool.available == engine.pool.capacity
