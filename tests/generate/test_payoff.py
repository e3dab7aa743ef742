"""Guesses are taken while they make tokens come faster, by what passes took of late."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.generate.payoff import FIXED, MEMORY, REMEMBERED, Payoff


def timed(costs: dict[int, float], *, rows: int = 1) -> Payoff:
    """A payoff that saw passes of so many guesses often enough."""
    payoff = Payoff()
    for _ in range(2 * REMEMBERED):
        for guesses in sorted(costs):
            payoff.learn(costs[guesses], rows=rows, guesses=guesses)
    return payoff


def taken(payoff: Payoff, chances: list[float], *, rows: int = 1) -> int:
    offer = payoff.offer(rows)
    return next((i for i, chance in enumerate(chances) if not offer.takes(chance)), len(chances))


def test_a_plain_pass_comes_first():
    payoff = Payoff()
    assert taken(payoff, [1.0]) == 0
    payoff.learn(1.0, rows=1, guesses=0)
    assert taken(payoff, [1.0]) == 1
    assert taken(payoff, [1.0], rows=2) == 0  # two rows are another matter


@pytest.mark.slow
@given(
    st.lists(st.floats(0.01, 3), min_size=7, max_size=7),
    st.lists(st.floats(0.05, 1), min_size=7, max_size=7),
)
def test_as_many_as_give_most_tokens_a_second(steps, factors):
    """For costs that rise ever faster, one guess after the other finds the best number of all."""
    costs, chances = [1.0], [1.0]
    for step, factor in zip(sorted(steps), factors, strict=True):
        costs.append(costs[-1] + step)
        chances.append(chances[-1] * factor)
    number = taken(timed(dict(enumerate(costs))), chances[1:])
    rates = [sum(chances[: k + 1]) / cost for k, cost in enumerate(costs)]
    assert rates[number] == pytest.approx(max(rates))


def test_chances_of_all_rows_share_a_pass():
    payoff = timed({0: 8.0, 1: 9.0, 2: 10.0}, rows=8)
    assert taken(payoff, [0.5], rows=8) == 0  # 8.5 tokens in 9 seconds
    assert taken(payoff, [1.0, 1.0], rows=8) == 0  # no faster than one after the other
    payoff = timed({0: 8.0, 1: 8.5, 2: 9.0}, rows=8)
    assert taken(payoff, [0.6, 0.6], rows=8) == 2


def test_what_was_not_timed_is_assumed_from_what_was():
    payoff = timed({0: 11.0, 4: 15.0})
    assert payoff.cost(1, 0) == 11
    assert payoff.cost(1, 1) == 12
    assert payoff.cost(1, 5) == pytest.approx(15 * (FIXED + 6) / (FIXED + 5))


def test_a_pass_costs_no_more_than_larger_ones():
    payoff = timed({0: 10.0, 1: 30.0, 3: 12.0})
    costs = [payoff.cost(1, guesses) for guesses in range(8)]
    assert all(a <= b for a, b in pairwise(costs[:4]))
    assert costs[1] == 12


def test_one_pass_that_was_held_up_changes_nothing():
    payoff = Payoff()
    payoff.learn(1.0, rows=1, guesses=0)
    payoff.learn(50.0, rows=1, guesses=1)
    assert taken(payoff, [0.9]) == 1
    payoff.learn(50.0, rows=1, guesses=0)
    assert payoff.cost(1, 0) == 1


def test_guesses_that_cost_too_much_are_tried_again_some_time():
    payoff = Payoff()
    payoff.learn(1.0, rows=1, guesses=0)
    tries = []
    for number in range(2 * MEMORY):
        guesses = taken(payoff, [0.9])
        tries += [number] * guesses
        payoff.learn(1.0 + 4 * guesses, rows=1, guesses=guesses)
    assert tries[:2] == [0, 1]
    assert MEMORY < tries[2] < MEMORY + 5
    assert len(tries) < 6
    for _ in range(MEMORY + 5):  # now they cost nothing
        guesses = taken(payoff, [0.9])
        payoff.learn(1.0, rows=1, guesses=guesses)
    assert taken(payoff, [0.9]) == 1


def test_a_machine_that_slows_down_goes_on_guessing():
    payoff = timed({0: 1.0, 1: 1.1})
    made = 0
    for _ in range(30):
        guesses = taken(payoff, [0.9])
        made += guesses
        payoff.learn(3.3 if guesses else 3.0, rows=1, guesses=guesses)
    assert made > 20


def test_without_a_clock_costs_are_assumed_for_good():
    payoff = Payoff(is_timed=False)
    assert taken(payoff, [0.2] * 9) == 9
    assert taken(payoff, [0.05]) == 0
    payoff.learn(100.0, rows=1, guesses=1)
    assert payoff.cost(1, 1) == FIXED + 2
