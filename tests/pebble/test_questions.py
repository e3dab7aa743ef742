import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from pebble import phrases
from pebble.caption import caption, joined
from pebble.conversation import (
    caption_sample,
    conversation,
    draw_questions,
    text_sample,
)
from pebble.questions import SKILLS
from pebble.reference import Question, reference
from pebble.relations import sideways
from pebble.sample import sample_scene
from pebble.scene import Scene
from tests.pebble import oracle

NUM_SCENES = 400


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, list[Question]]]:
    pairs = []
    for seed in range(NUM_SCENES):
        scene = sample_scene(seed)
        pairs.append((scene, draw_questions(scene, np.random.default_rng(seed))))
    return pairs


@pytest.mark.slow
def test_every_answer_follows_from_the_scene(asked):
    for scene, turns in asked:
        it = None
        for turn in turns:
            verdict = oracle.answer(
                scene, turn.text, turn.skill, it if turn.needs_previous else None
            )
            assert turn.answer == verdict.answer, (turn, scene)
            it = verdict.about
            if turn.about is not None:
                assert it == turn.about, turn


def test_the_oracle_refuses_what_is_doubtful():
    scene = next(s for s in map(sample_scene, range(99)) if len(s.objects) > 3)
    with pytest.raises(oracle.DoubtError, match="fits"):
        oracle.answer(scene, "Where is the object?", "place", None)


def test_a_conversation_has_six_to_ten_different_questions_about_objects(asked):
    lengths = Counter()
    for scene, turns in asked:
        fresh = [turn.text for turn in turns if not turn.needs_previous]
        assert len(fresh) == len(set(fresh))
        if scene.objects:
            lengths[len(fresh)] += 1
        else:
            assert 2 <= len(turns) <= 5
    assert max(lengths) == 10
    assert sum(n for length, n in lengths.items() if 5 <= length <= 10) > 0.97 * lengths.total()


def test_short_answers_come_first_unless_a_description_opens(asked):
    for _, turns in asked:
        long = [len(turn.answer) > 24 for turn in turns if not turn.needs_previous]
        assert long[1:] == sorted(long[1:])


@pytest.mark.slow
def test_every_skill_is_asked(asked):
    skills = Counter(turn.skill for _, turns in asked for turn in turns)
    assert set(skills) == set(SKILLS)
    assert min(skills.values()) > 0.02 * skills.total()


def test_answers_are_balanced(asked):
    answers = defaultdict(Counter)
    for _, turns in asked:
        for turn in turns:
            answers[turn.skill][turn.answer] += 1
    for skill, counter in (("yes/no", answers["yes/no"]), ("relation", answers["relation"])):
        assert 0.8 < counter["yes"] / counter["no"] < 1.25, skill
    assert 0.7 < answers["size"]["small"] / answers["size"]["large"] < 1.6
    for skill, options, least in (("shape", 6, 0.7), ("count", 6, 0.3), ("digit", 10, 0.2)):
        usual = [n for answer, n in answers[skill].items() if not answer.startswith("there")]
        assert len(usual) == options
        assert min(usual) > least * np.mean(usual), skill
    assert answers["relation"]["nothing"] < 0.35 * answers["relation"].total()
    assert len(answers["reading"]) > 30


def test_half_of_the_yes_no_questions_of_every_wording_are_answered_yes(asked):
    groups = defaultdict(list)
    for _, turns in asked:
        for turn in turns:
            if turn.answer in ("yes", "no"):
                groups[" ".join(turn.text.split()[:2])].append(turn.answer == "yes")
    for start, truths in groups.items():
        if len(truths) > 100:
            assert 0.35 < np.mean(truths) < 0.65, start


def test_frequent_questions_have_ten_wordings_and_the_readme_is_among_them():
    for wordings in (
        phrases.DESCRIBE,
        phrases.LIST,
        phrases.COUNT_ALL,
        phrases.READ,
        phrases.DIGIT,
    ):
        assert len(set(wordings)) >= 10
    assert "What is in this picture?" in phrases.LIST
    assert "And what is {side} it?" in phrases.WHAT_SIDE_IT
    assert "left of" in phrases.SIDES["left"]


def test_the_follow_up_of_the_readme_is_asked(asked):
    starts = Counter(turn.text for _, turns in asked for turn in turns if turn.needs_previous)
    assert starts["And what is left of it?"] > 0


def test_no_placeholder_is_left_in_a_question(asked):
    for _, turns in asked:
        for turn in turns:
            assert not re.search(r"[{}<>]|  ", turn.text + turn.answer)
            assert turn.answer == turn.answer.strip().lower()


def test_the_same_generator_gives_the_same_conversation():
    scene = sample_scene(3)
    one, two = (conversation(scene, np.random.default_rng(5)) for _ in range(2))
    assert one == two
    assert one != conversation(scene, np.random.default_rng(6))


def test_samples_have_the_layout_of_llava():
    sample = json.loads(json.dumps(conversation(sample_scene(1), np.random.default_rng(1))))
    values = sample["conversations"]
    assert sample["image"] == "1"
    assert values[0]["value"].startswith("<image>\n")
    assert [turn["from"] for turn in values] == ["human", "gpt"] * len(sample["skills"])
    assert sum("<image>" in turn["value"] for turn in values) == 1


def test_caption_samples_ask_nothing():
    scene = sample_scene(2)
    values = caption_sample(scene)["conversations"]
    assert [turn["value"] for turn in values] == ["<image>", caption(scene)]


def test_text_samples_put_the_caption_in_the_place_of_the_picture():
    scene = sample_scene(2)
    sample = text_sample(scene, np.random.default_rng(0))
    assert "image" not in sample
    assert sample["conversations"][0]["value"].startswith(caption(scene) + "\n")


def test_a_reference_means_one_object_only(asked):
    rng = np.random.default_rng(0)
    for scene, _ in asked[:300]:
        for item in scene.objects:
            name = reference(scene, item, rng)
            if name is not None:
                assert oracle.the_one(scene, name, None) is item


def test_sides_are_opposite(asked):
    opposite = {"left": "right", "above": "below"}
    for scene, _ in asked[:200]:
        for item in scene.objects:
            for other in scene.objects:
                for side, back in opposite.items():
                    assert sideways(item, other, side) == sideways(other, item, back)


def test_joined():
    assert [joined(list("xyz")[:n]) for n in range(4)] == ["", "x", "x and y", "x, y and z"]
