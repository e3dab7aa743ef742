"""Figures of an engine whose clock is known."""

import time
from collections.abc import Sequence

import pytest

from benchmarks.figures import (
    Plan,
    Question,
    measure,
    peak_bytes,
    picture,
    rate,
    rate_of_many,
    words,
)


class Steady:
    """First token after 0.5 s, a second one of the same picture after 0.05 s, then 100 a second."""

    side = 4

    def __init__(self) -> None:
        self.facts = {"weight_bytes": 7.0}
        self.asked: list[Question] = []
        self.looks: list[bytes] = []

    def look(self, picture: bytes) -> None:
        self.looks.append(picture)
        time.sleep(0.002)

    def answer(self, questions: Sequence[Question], new_tokens: int) -> list[list[float]]:
        first = 0.05 if any(q.pictures == questions[0].pictures for q in self.asked) else 0.5
        self.asked += questions
        return [[first + i / 100 for i in range(new_tokens)] for _ in questions]


def test_figures_of_a_known_engine() -> None:
    engine = Steady()
    found = measure(engine, Plan(new_tokens=11, repeats=3, many=4))
    assert found["first_s"] == pytest.approx(0.5)
    assert found["second_s"] == pytest.approx(0.05)
    assert found["second_over_first"] == pytest.approx(0.1)
    assert found["tokens_per_s"] == pytest.approx(100)
    assert found["many_tokens_per_s"] == pytest.approx(400)
    assert found["many_whole_tokens_per_s"] == pytest.approx(44 / 0.6)
    assert found["weight_bytes"] == 7
    assert found["tower_s"] >= 0.002
    assert found["many_peak_bytes"] >= found["peak_bytes"] > 1e6


def test_first_questions_show_new_pictures_and_second_ones_the_same() -> None:
    engine = Steady()
    measure(engine, Plan(repeats=3, many=2))
    seen = [question for question in engine.asked if question.pictures]
    firsts, seconds = seen[0:6:2], seen[1:6:2]
    assert [q.pictures for q in firsts] == [q.pictures for q in seconds]
    assert all(a.text != b.text for a, b in zip(firsts, seconds, strict=True))
    shown = [*engine.looks, *(q.pictures[0] for q in [*firsts, *seen[6:]])]
    assert len(set(shown)) == len(shown)
    assert {len(question.text) for question in seen} == {39}


def test_many_are_counted_while_all_of_them_grow() -> None:
    early, late = [1.0, 2.0, 3.0, 4.0], [2.5, 3.0, 3.5, 4.0]
    assert rate_of_many([early, late]) == pytest.approx(5 / 1.5)
    assert rate_of_many([[1.0, 2.0], [3.0, 4.0]]) == 0
    assert rate([1.0, 1.5, 2.0]) == 2


def test_pictures_and_words_differ_by_number_and_stay() -> None:
    assert len(picture(1, 8)) == 3 * 8 * 8
    assert picture(1, 8) == picture(1, 8) != picture(2, 8)
    assert words(1, 5, 100) == words(1, 5, 100) != words(2, 5, 100)
    assert all(10 <= token < 50 for token in words(3, 500, 50))


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_bytes()
    assert before is not None
    held = bytearray(b"x" * (64 << 20))
    after = peak_bytes()
    assert after is not None
    assert after - before > 0 or before > len(held)
