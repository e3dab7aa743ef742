"""Speculative decoding: drafts come from text only, change no answer, and save time."""

import dataclasses
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import GenerationError
from lapilli.generate.engine import Engine
from lapilli.generate.speculative import (
    CONTEXTS,
    FIXED,
    MEMORY,
    REMEMBERED,
    DraftModel,
    NewProposer,
    PromptLookup,
    SpeculationController,
)
from lapilli.lm.decoder import Decoder
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import CONFIG, SMALL, alone, build, picture, request_of

ON = dataclasses.replace(SMALL, speculate="on")


def always(chance: float) -> bool:
    return chance > 0


class Parrot:
    """Guesses that are right, wrong or half right, from a list; says that it is sure of them."""

    def __init__(self, *guesses: int) -> None:
        self.guesses = guesses
        self.proposed = 0

    def __call__(self) -> "Parrot":
        return self

    def propose(self, keys, most, is_worth):
        guess = [g for g in self.guesses[len(keys) % 3 :][:most] if is_worth(1.0)]
        self.proposed += len(guess)
        return guess


@pytest.fixture(scope="module")
def model():
    return build()


def look_up(keys, most, is_worth=always):
    return PromptLookup().propose(keys, most, is_worth)


def test_lookup_proposes_what_followed_last_time():
    assert look_up([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]
    assert look_up([1, 2, 3, 4, 5, 1, 2, 9, 1, 2], 3) == [9, 1, 2]  # the latest place
    assert look_up([1, 2, 3, 4, 5, 1, 2, 9, 1, 2, 3], 9)[:2] == [4, 5]


def test_longer_contexts_have_higher_chances():
    assert look_up([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == [3]  # 1 2 alone: 4
    assert look_up([1, 2, 4, 2, 5, 7, 1, 2], 1) == [4]  # 2 alone: 5


def test_repeated_contexts_have_higher_chances():
    # After 1 2 there was always another number, after 2 alone 5, twice.
    keys = [1, 2, 3, 0, 1, 2, 4, 0, 9, 2, 5, 8, 2, 5, 8, 2, 5, 0, 1, 2]
    assert look_up(keys, 1) == [5]


def test_a_context_with_a_gap_finds_what_follows_a_new_number():
    lines = [6, 7, 31, 8, 9, 6, 7, 32, 8, 9, 6, 7, 33]
    assert look_up(lines, 3) == [8, 9, 6]


def test_lookup_without_a_match_proposes_nothing():
    assert look_up([1, 2, 3, 4], 4) == []
    assert look_up([1], 4) == []
    assert look_up([], 4) == []


def test_lookup_stops_where_a_draft_token_is_not_worth_it():
    asked = []

    def thrice(chance):
        asked.append(chance)
        return len(asked) <= 3

    assert look_up([1, 2, 3, 4, 5, 6, 1, 2], 9, thrice) == [3, 4, 5]
    assert len(asked) == 4
    assert sorted(asked, reverse=True) == asked
    assert look_up([1, 2, 3, 1, 2], 9, lambda chance: chance > 1) == []


def chance_of_first(keys, known) -> float:
    """What lookup thinks of its next guess after an answer that began at `known`."""
    proposer = PromptLookup()
    proposer.propose(keys[:known], 1, always)
    chances = [0.0]
    proposer.propose(keys, 1, lambda chance: chances.append(chance) is None)
    return chances[-1]


def test_lookup_learns_its_hit_rate_from_the_answer():
    prompt = [n for i in range(20) for n in (1, 10 + i)]
    wrong = [n for i in range(20) for n in (1, 40 + i)]
    right = [1, 10] * 20
    fresh = chance_of_first([*prompt, 1], len(prompt) + 1)
    assert chance_of_first([*prompt, 1, *wrong, 1], len(prompt) + 1) < 0.5 * fresh
    assert chance_of_first([*prompt, 1, *right, 1], len(prompt) + 1) > 0.8


def allowed_guesses(keys) -> set[int]:
    """By comparing the end with every place in the text: the plain twin of the tables."""
    return {
        keys[at]
        for reach, gap in CONTEXTS
        for at in range(reach, len(keys))
        if keys[at] >= 0
        and min(keys[at - reach : at]) >= 0
        and min(keys[-reach:]) >= 0
        and keys[at - reach : at - gap] == keys[len(keys) - reach : len(keys) - gap]
    }


@given(
    st.lists(st.integers(0, 2) | st.integers(-9, -1), max_size=30),
    st.integers(1, 8),
    st.integers(1, 30),
)
def test_lookup_never_touches_a_medium(keys, most, cut):
    proposer = PromptLookup()
    proposer.propose(keys[:cut], most, always)
    proposed = proposer.propose(keys, most, always)
    assert len(proposed) <= most
    assert bool(proposed) == bool(allowed_guesses(keys))
    for i, guess in enumerate(proposed):
        assert guess in allowed_guesses([*keys, *proposed[:i]])


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


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 3) | st.just(None), min_size=1, max_size=9), options()),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["lookup", "parrot", "itself", "small"]),
)
@settings(max_examples=12, deadline=None)
def test_answers_are_those_without_drafts(model, drawn, kind):
    proposers: dict[str, NewProposer] = {
        "lookup": PromptLookup,
        "parrot": Parrot(4, 5, 6, 7, 8, 9),
        "itself": DraftModel(model.language_model),
        "small": DraftModel(small_model()),
    }
    requests = [
        request_of([picture(1) if part is None else part for part in parts], seed=11, **chosen)
        for parts, chosen in drawn
    ]
    engine = Engine(model, WordTokenizer(), options=ON, proposer=proposers[kind])
    for request, answer in zip(requests, engine.run(requests), strict=True):
        assert_same(answer, alone(model, request), model, request)
    assert engine.pool.available == engine.pool.capacity


def small_model() -> Decoder:
    torch.manual_seed(1)
    return Decoder(dataclasses.replace(CONFIG, num_layers=1)).eval()


def passes_for(model, proposer, request, **changes) -> int:
    engine = Engine(
        model, WordTokenizer(), options=dataclasses.replace(ON, **changes), proposer=proposer
    )
    engine.submit(request)
    steps = 1
    while engine.step():
        steps += 1
    return steps


@pytest.mark.slow
def test_right_drafts_save_passes(model):
    request = request_of([3, 4], max_new_tokens=30)
    assert passes_for(model, DraftModel(model.language_model), request) <= 6
    assert passes_for(model, Parrot(), request) == 30


def test_speculation_can_be_turned_off(model):
    parrot = Parrot(4, 5, 6)
    passes_for(model, parrot, request_of([3], max_new_tokens=10), speculate="off")
    assert parrot.proposed == 0


@pytest.mark.slow
def test_cached_blocks_hold_no_rejected_draft_token(model):
    engine = Engine(model, WordTokenizer(), options=ON, proposer=Parrot(4, 5, 6, 7, 8, 9))
    first = request_of([3, 4], max_new_tokens=20)
    [answer] = engine.run([first])
    further = request_of([3, 4, *answer.token_ids, 8], max_new_tokens=10)
    [second] = engine.run([further])
    assert engine.prefix_stats.cached_tokens == 21
    assert_same(second, alone(model, further), model, further)


@pytest.mark.slow
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
        proposer=Parrot(*guesses),
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
    proposer = DraftModel(small)()
    assert len(proposer.propose(list(range(20)), 5, always)) == 5
    assert proposer.propose(list(range(20)) * 6, 9, always) == []


def test_draft_model_does_not_run_where_it_is_not_worth_it():
    small = small_model()
    proposer, keys = DraftModel(small)(), list(range(20))
    with torch.no_grad():
        small.forward = pytest.fail
        assert proposer.propose(keys, 5, lambda chance: chance > 1) == []
        del small.forward
    assert proposer.propose(keys, 3, always) == DraftModel(small)().propose(keys, 3, always)


def test_draft_model_learns_how_often_it_is_right():
    proposer, keys = DraftModel(small_model())(), [3, 4, 5]
    chances = []

    def note(chance):
        chances.append(chance)
        return True

    for is_right in [True] * 8 + [False] * 8:
        [guess] = proposer.propose(keys, 1, note)
        keys = [*keys, guess if is_right else (guess + 1) % 61]
    assert chances[0] == pytest.approx(0.7)
    assert chances[8] > 0.85
    assert chances[15] < 0.5


def test_draft_model_of_another_vocabulary_is_refused(model):
    other = Decoder(dataclasses.replace(CONFIG, num_layers=1, vocab_size=60)).eval()
    with pytest.raises(GenerationError, match="has 60 tokens, the model that it drafts for 61"):
        Engine(model, WordTokenizer(), proposer=DraftModel(other))


class Priced(SpeculationController):
    """Passes that take what they are said to."""

    def __init__(self, price: float) -> None:
        super().__init__()
        self.price = price
        self.drafts = 0

    def learn(self, seconds, *, rows, drafts):
        self.drafts += drafts
        super().learn(1.0 * rows + self.price * drafts, rows=rows, drafts=drafts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft_layers", "price", "fewest", "most"),
    [(2, 0.1, 150, 270), (2, 2, 0, 20), (1, 0.5, 0, 60)],
)
def test_engine_makes_the_drafts_that_save_time(model, draft_layers, price, fewest, most):
    """The model itself is always right, with one layer it seldom is."""
    draft = model.language_model if draft_layers == 2 else small_model()
    options = dataclasses.replace(SMALL, speculate="auto")
    engine = Engine(model, WordTokenizer(), options=options, proposer=DraftModel(draft))
    engine.scheduler.speculation = Priced(price)
    requests = [request_of([3, i], max_new_tokens=90) for i in range(3)]
    engine.run(requests)
    assert engine.scheduler.speculation.drafts > 0  # it was tried
    engine.scheduler.speculation.drafts = 0
    engine.run(requests)
    assert fewest <= engine.scheduler.speculation.drafts <= most


def test_an_unknown_speculate_option_is_refused():
    with pytest.raises(GenerationError, match="speculate must be"):
        dataclasses.replace(SMALL, speculate="sometimes")


def timed(costs: dict[int, float], *, rows: int = 1) -> SpeculationController:
    """A controller that saw passes of so many guesses often enough."""
    controller = SpeculationController()
    for _ in range(2 * REMEMBERED):
        for guesses in sorted(costs):
            controller.learn(costs[guesses], rows=rows, drafts=guesses)
    return controller


def taken(controller: SpeculationController, chances: list[float], *, rows: int = 1) -> int:
    budget = controller.budget(rows)
    return next((i for i, chance in enumerate(chances) if not budget.accepts(chance)), len(chances))


def test_a_pass_without_drafts_comes_first():
    controller = SpeculationController()
    assert taken(controller, [1.0]) == 0
    controller.learn(1.0, rows=1, drafts=0)
    assert taken(controller, [1.0]) == 1
    assert taken(controller, [1.0], rows=2) == 0  # two rows are another matter


@pytest.mark.slow
@given(
    st.lists(st.floats(0.01, 3), min_size=7, max_size=7),
    st.lists(st.floats(0.05, 1), min_size=7, max_size=7),
)
def test_the_number_of_drafts_gives_most_tokens_per_second(steps, factors):
    """For costs that rise ever faster, one guess after the other finds the best number of all."""
    costs, chances = [1.0], [1.0]
    for step, factor in zip(sorted(steps), factors, strict=True):
        costs.append(costs[-1] + step)
        chances.append(chances[-1] * factor)
    number = taken(timed(dict(enumerate(costs))), chances[1:])
    rates = [sum(chances[: k + 1]) / cost for k, cost in enumerate(costs)]
    assert rates[number] == pytest.approx(max(rates))


def test_all_rows_share_the_budget_of_a_pass():
    controller = timed({0: 8.0, 1: 9.0, 2: 10.0}, rows=8)
    assert taken(controller, [0.5], rows=8) == 0  # 8.5 tokens in 9 seconds
    assert taken(controller, [1.0, 1.0], rows=8) == 0  # no faster than one after the other
    controller = timed({0: 8.0, 1: 8.5, 2: 9.0}, rows=8)
    assert taken(controller, [0.6, 0.6], rows=8) == 2


def test_unmeasured_costs_are_interpolated():
    controller = timed({0: 11.0, 4: 15.0})
    assert controller.cost(1, 0) == 11
    assert controller.cost(1, 1) == 12
    assert controller.cost(1, 5) == pytest.approx(15 * (FIXED + 6) / (FIXED + 5))


def test_a_pass_costs_at_most_what_larger_ones_do():
    controller = timed({0: 10.0, 1: 30.0, 3: 12.0})
    costs = [controller.cost(1, guesses) for guesses in range(8)]
    assert all(a <= b for a, b in pairwise(costs[:4]))
    assert costs[1] == 12


def test_one_outlier_changes_no_cost():
    controller = SpeculationController()
    controller.learn(1.0, rows=1, drafts=0)
    controller.learn(50.0, rows=1, drafts=1)
    assert taken(controller, [0.9]) == 1
    controller.learn(50.0, rows=1, drafts=0)
    assert controller.cost(1, 0) == 1


def test_sizes_that_cost_too_much_are_tried_again_later():
    controller = SpeculationController()
    controller.learn(1.0, rows=1, drafts=0)
    tries = []
    for number in range(2 * MEMORY):
        guesses = taken(controller, [0.9])
        tries += [number] * guesses
        controller.learn(1.0 + 4 * guesses, rows=1, drafts=guesses)
    assert tries[:2] == [0, 1]
    assert MEMORY < tries[2] < MEMORY + 5
    assert len(tries) < 6
    for _ in range(MEMORY + 5):  # now they cost nothing
        guesses = taken(controller, [0.9])
        controller.learn(1.0, rows=1, drafts=guesses)
    assert taken(controller, [0.9]) == 1


def test_drafts_go_on_when_the_machine_slows_down():
    controller = timed({0: 1.0, 1: 1.1})
    made = 0
    for _ in range(30):
        guesses = taken(controller, [0.9])
        made += guesses
        controller.learn(3.3 if guesses else 3.0, rows=1, drafts=guesses)
    assert made > 20


def test_without_a_clock_the_assumed_costs_stay():
    controller = SpeculationController(is_timed=False)
    assert taken(controller, [0.2] * 9) == 9
    assert taken(controller, [0.05]) == 0
    controller.learn(100.0, rows=1, drafts=1)
    assert controller.cost(1, 1) == FIXED + 2
