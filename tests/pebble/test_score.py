from collections import Counter

import pytest

from lapilli.errors import ConfigError
from pebble.blind import NEEDS_PICTURE
from pebble.caption import TOO_SMALL
from pebble.digits import digit_split
from pebble.examine import messages_of
from pebble.glyphs import BITMAP_FONT
from pebble.questions import SKILLS
from pebble.score import (
    EXAM_SEED,
    WIDER,
    ExamItem,
    Tally,
    exam,
    held_out_digits,
    is_exact,
    normalised,
    score,
    wider_exam,
)


@pytest.fixture(scope="module")
def items():
    return exam(120)


@pytest.mark.slow
def test_every_skill_is_examined_about_equally(items):
    skills = Counter(item.skill for item in items)
    assert set(skills) == set(SKILLS)
    assert max(skills.values()) == 10
    assert min(skills.values()) >= 6


def test_exam_scenes_are_fresh_and_differ(items):
    seeds = [item.scene.seed for item in items]
    assert min(seeds) >= EXAM_SEED
    assert len(set(seeds)) == len(seeds) == 120


@pytest.mark.slow
def test_the_exam_is_the_same_every_time():
    assert exam(20) == exam(20)
    assert exam(20) != exam(20, first_seed=EXAM_SEED + 1)


def test_digits_of_the_exam_are_held_out(items):
    held_out = set(digit_split()[1])
    shown = [item.scene.digit.index for item in items if item.scene.digit is not None]
    assert len(shown) >= 8
    assert set(shown) <= held_out


def test_only_follow_ups_have_a_history(items):
    for item in items:
        says_it = item.question.split()[-1] == "it?" and item.skill == "relation"
        assert len(item.history) <= 1
        assert says_it or not item.history


@pytest.mark.slow
def test_every_held_out_digit_is_asked_once():
    digits = held_out_digits()
    assert sorted(item.scene.digit.index for item in digits) == sorted(digit_split()[1])
    assert all(item.answer == str(item.scene.digit.value) for item in digits)


@pytest.mark.slow
def test_the_wider_exam_asks_for_type_of_any_size_and_without_a_picture():
    items = wider_exam()
    assert Counter(item.skill for item in items) == WIDER
    for item in items:
        if item.skill == "asked without a picture":
            assert item.scene is None
            assert item.answer == NEEDS_PICTURE
            continue
        writing = item.scene.writing
        assert item.scene.seed >= EXAM_SEED
        assert writing.is_small == (item.skill == "type too small to read")
        assert item.answer == (TOO_SMALL if writing.is_small else writing.text)
        if "default font" in item.skill:
            assert writing.font in (0, BITMAP_FONT)
    assert wider_exam() == items


def test_questions_without_a_picture_reach_a_model_without_one():
    item = ExamItem(scene=None, history=(), question="Hello", answer=NEEDS_PICTURE, skill="blind")
    assert [len(message.media) for message in messages_of(item, None)] == [0]
    assert [len(message.media) for message in messages_of(item, "picture")] == [1]


@pytest.mark.parametrize(
    ("answer", "truth", "exact"),
    [
        ("A  red circle.", "a red circle", True),
        (" yes\n", "yes", True),
        ("3", "3", True),
        ("a red circle", "a red ring", False),
        ("", "no", False),
        ("top left", "left", False),
    ],
)
def test_exact_means_word_for_word(answer, truth, exact):
    assert is_exact(answer, truth) is exact


def test_normalised_drops_one_full_stop():
    assert normalised(" A  b. ") == "a b"
    assert normalised("3.5") == "3.5"


def test_scores_per_skill_add_up(items):
    sizes = []

    def answer(batch):
        sizes.append(len(batch))
        return [item.answer if item.skill != "count" else "many" for item in batch]

    tallies = score(answer, items, batch_size=50)
    assert sizes == [50, 50, 20]
    assert tallies["all"].total == 120
    assert tallies["all"].right == 120 - tallies["count"].total
    assert tallies["count"].accuracy == 0.0
    assert tallies["colour"].accuracy == 1.0
    assert sum(tally.total for skill, tally in tallies.items() if skill != "all") == 120


def test_an_empty_tally_is_nought():
    assert Tally(right=0, total=0).accuracy == 0.0


def test_a_model_that_loses_answers_is_refused(items):
    with pytest.raises(ConfigError, match="10 questions but 9 answers"):
        score(lambda batch: [""] * (len(batch) - 1), items[:10])
