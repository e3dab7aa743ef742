"""Guesses come from text only; checked, they change no answer; a clock decides whether they pay."""

import dataclasses
from collections import Counter
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import GenerationError
from lapilli.generate.engine import Engine
from lapilli.generate.speculate import (
    Drafter,
    DraftModel,
    Pace,
    Payoff,
    PromptLookup,
)
from lapilli.lm.decoder import Decoder
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import CONFIG, SMALL, alone, build, picture, request_of

ON = dataclasses.replace(SMALL, speculate="on")


class Parrot:
    """Guesses that are right, wrong or half right, from a list."""

    def __init__(self, *guesses: int) -> None:
        self.guesses = guesses
        self.proposed = 0

    def begin(self) -> "Parrot":
        return self

    def propose(self, keys, most):
        guess = list(self.guesses[len(keys) % 3 :][:most])
        self.proposed += len(guess)
        return guess


@pytest.fixture(scope="module")
def model():
    return build()


def test_lookup_proposes_what_followed_last_time():
    drafting = PromptLookup(longest=3, shortest=2).begin()
    assert drafting.propose([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]
    assert drafting.propose([1, 2, 3, 4, 5, 1, 2, 9, 1, 2], 3) == [9, 1, 2]  # the latest place
    assert drafting.propose([1, 2, 3, 4, 5, 1, 2, 9, 1, 2, 3], 9) == [4, 5, 1, 2, 9, 1, 2, 3]


def test_lookup_takes_the_longest_match():
    keys = [7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2]
    assert PromptLookup(longest=3, shortest=2).begin().propose(keys, 1) == [3]
    assert PromptLookup(longest=2, shortest=2).begin().propose(keys, 1) == [4]


def test_lookup_without_a_match_proposes_nothing():
    assert PromptLookup().begin().propose([1, 2, 3, 4], 4) == []
    assert PromptLookup().begin().propose([1], 4) == []
    assert PromptLookup().begin().propose([], 4) == []


@given(
    st.lists(st.integers(0, 2) | st.integers(-9, -1), max_size=30),
    st.integers(1, 8),
    st.integers(1, 30),
)
def test_lookup_never_touches_a_medium(keys, most, cut):
    drafting = PromptLookup(longest=3, shortest=1).begin()
    drafting.propose(keys[:cut], most)  # asked before: what it knows must not depend on that
    proposed = drafting.propose(keys, most)
    assert proposed == PromptLookup(longest=3, shortest=1).begin().propose(keys, most)
    assert len(proposed) <= most
    assert min(proposed, default=0) >= 0
    if proposed:
        # It stands somewhere in the text, right after tokens that end the sequence now.
        places = [
            at
            for at in range(1, len(keys))
            if keys[at : at + len(proposed)] == proposed and keys[at - 1] == keys[-1] >= 0
        ]
        assert places


@pytest.mark.parametrize(("longest", "shortest"), [(2, 3), (2, 0)])
def test_lookup_of_nonsense_is_refused(longest, shortest):
    with pytest.raises(GenerationError, match="needs 1 <= shortest <= longest"):
        PromptLookup(longest=longest, shortest=shortest)


def options():
    return st.fixed_dictionaries(
        {"max_new_tokens": st.integers(1, 20)},
        optional={
            "temperature": st.sampled_from([0.5, 2.0]),
            "repetition_penalty": st.sampled_from([0.4, 1.3]),
            "logprobs": st.just(1),
            "stop": st.just((" w3",)),
            "stop_token_ids": st.just((5, 7)),
        },
    )


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 3) | st.just(None), min_size=1, max_size=9), options()),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["lookup", "parrot", "itself", "small"]),
)
@settings(max_examples=25, deadline=None)
def test_answers_are_those_without_guesses(model, drawn, kind):
    drafters: dict[str, Drafter] = {
        "lookup": PromptLookup(longest=2, shortest=1),
        "parrot": Parrot(4, 5, 6, 7, 8, 9),
        "itself": DraftModel(model.language_model),
        "small": DraftModel(small_model()),
    }
    requests = [
        request_of([picture(1) if part is None else part for part in parts], seed=11, **chosen)
        for parts, chosen in drawn
    ]
    engine = Engine(model, WordTokenizer(), options=ON, drafter=drafters[kind])
    for request, answer in zip(requests, engine.run(requests), strict=True):
        assert_same(answer, alone(model, request), model, request)
    assert engine.pool.available == engine.pool.capacity


def small_model() -> Decoder:
    torch.manual_seed(1)
    return Decoder(dataclasses.replace(CONFIG, num_layers=1)).eval()


def passes_for(model, drafter, request, **changes) -> int:
    engine = Engine(
        model, WordTokenizer(), options=dataclasses.replace(ON, **changes), drafter=drafter
    )
    engine.submit(request)
    steps = 1
    while engine.step():
        steps += 1
    return steps


def test_right_guesses_save_passes(model):
    request = request_of([3, 4], max_new_tokens=30)
    assert passes_for(model, DraftModel(model.language_model), request) <= 6
    assert passes_for(model, Parrot(), request) == 30


def test_guesses_are_off(model):
    parrot = Parrot(4, 5, 6)
    passes_for(model, parrot, request_of([3], max_new_tokens=10), speculate="off")
    assert parrot.proposed == 0


def test_kept_blocks_hold_no_rejected_guess(model):
    engine = Engine(model, WordTokenizer(), options=ON, drafter=Parrot(4, 5, 6, 7, 8, 9))
    first = request_of([3, 4], max_new_tokens=20)
    [answer] = engine.run([first])
    further = request_of([3, 4, *answer.token_ids, 8], max_new_tokens=10)
    [second] = engine.run([further])
    assert engine.prefix_stats.reused == 21
    assert_same(second, alone(model, further), model, further)


@pytest.mark.parametrize("guesses", [(), (0,), (1, 1), (2, 0, 1)])
def test_sampled_tokens_keep_their_distribution(guesses):
    """Pairs of tokens of a tiny vocabulary against their exact probabilities."""
    torch.manual_seed(2)
    config = dataclasses.replace(CONFIG, vocab_size=4)
    model = build(config)
    runs = 800
    engine = Engine(
        model,
        WordTokenizer(),
        options=dataclasses.replace(ON, max_rows=64, kv_bytes=1 << 22),
        drafter=Parrot(*guesses),
    )
    request = request_of([3, 1], max_new_tokens=2, temperature=1.7)
    seen = Counter(answer.token_ids for answer in engine.run([request] * runs))
    exact = pair_probabilities(model, [3, 1], temperature=1.7)
    chi_square = sum(
        (seen[pair] - runs * p) ** 2 / (runs * p) for pair, p in exact.items() if runs * p > 1
    )
    assert chi_square < 45  # 15 degrees of freedom: exceeded once in 10,000 fair runs


@torch.inference_mode()
def pair_probabilities(model, prompt, *, temperature):
    def after(ids):
        x = model.language_model.embed(torch.tensor([ids]))
        hidden = model.language_model.forward(x, position_ids=torch.arange(len(ids))[None])
        return (model.logits(hidden[0, -1]) / temperature).softmax(-1).tolist()

    return {
        (a, b): p * q
        for a, p in enumerate(after(prompt))
        for b, q in enumerate(after([*prompt, a]))
    }


def test_draft_model_stops_at_the_end_of_its_context():
    small = small_model()
    drafting = DraftModel(small).begin()
    assert len(drafting.propose(list(range(20)), 5)) == 5
    assert drafting.propose(list(range(20)) * 6, 9) == []


def test_draft_model_of_other_tokens_is_refused(model):
    other = Decoder(dataclasses.replace(CONFIG, num_layers=1, vocab_size=60)).eval()
    with pytest.raises(GenerationError, match="has 60 tokens, the model that it guesses for 61"):
        Engine(model, WordTokenizer(), drafter=DraftModel(other))


def test_pace_follows_success():
    pace = Pace(first=4, most=10)
    pace.learn(4, 4)
    assert pace.length == 8
    pace.learn(8, 8)
    assert pace.length == 10
    pace.learn(10, 2)
    assert pace.length == 3
    pace.learn(3, 0)
    assert pace.length == 1


def run_payoff(payoff: Payoff, *, guess_seconds: float, tokens: int, passes: int) -> int:
    """Passes with guesses among so many, a plain one taking a second."""
    guessed = 0
    for _ in range(passes):
        wants = payoff.wants_guesses(1)
        guessed += wants
        payoff.learn(
            guess_seconds if wants else 1.0, rows=1, tokens=tokens if wants else 1, guessed=wants
        )
    return guessed


def test_guessing_that_pays_goes_on():
    payoff = Payoff()
    payoff.learn(1.0, rows=1, tokens=1, guessed=False)
    assert run_payoff(payoff, guess_seconds=1.2, tokens=2, passes=100) == 99  # one to compare
    assert payoff.gain == pytest.approx(2 / 1.2, rel=0.01)


def test_guessing_that_does_not_pay_stops_and_is_tried_again():
    payoff = Payoff()
    payoff.learn(1.0, rows=1, tokens=1, guessed=False)
    guessed = run_payoff(payoff, guess_seconds=1.5, tokens=1, passes=1000)
    assert 8 <= guessed < 50
    assert run_payoff(payoff, guess_seconds=0.5, tokens=3, passes=2000) > 500


def test_engine_switches_useless_guesses_off(model):
    parrot = Parrot(60, 60, 60)  # what nobody says
    engine = Engine(
        model,
        WordTokenizer(),
        options=dataclasses.replace(SMALL, speculate="auto"),
        drafter=parrot,
    )
    ticks = count()
    engine.payoff.clock = lambda: float(
        next(ticks) ** 2
    )  # every pass takes longer than the one before
    engine.run([request_of([3, i], max_new_tokens=90) for i in range(3)])
    assert 0 < parrot.proposed < 3 * 3 * 40  # 89 passes of 3 rows


def test_wrong_word_is_refused():
    with pytest.raises(GenerationError, match="speculate must be"):
        dataclasses.replace(SMALL, speculate="sometimes")
