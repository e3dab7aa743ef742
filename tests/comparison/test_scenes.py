"""Scenes as rows of texts: questions with answers of the list, and what follows every word."""

import pytest
import torch

from comparison.scenes import (
    ANSWERS,
    ASK,
    DESCRIBE,
    END,
    MOST,
    PAD,
    SKILLS,
    UNKNOWN,
    Scenes,
    Vocabulary,
    captions_of,
    few_objects,
    most_frequent,
    questions_about,
    questions_of,
    standardise,
    words_of,
)
from pebble.caption import caption


@pytest.fixture(scope="module")
def scenes():
    drawn = few_objects(7, 6)
    return Scenes(
        features=torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1,
        captions=tuple(words_of(caption(one)) for one in drawn),
        questions=tuple(tuple(questions_about(one, 5)) for one in drawn),
    )


def test_scenes_hold_few_objects_and_are_asked_different_things():
    drawn = few_objects(7, 20)
    assert {len(one.objects) for one in drawn} == set(range(1, MOST + 1))
    for scene in drawn:
        asked = questions_about(scene, 5)
        assert len({one.words for one in asked}) == len(asked) == 5
        assert {one.skill for one in asked} <= set(SKILLS)


def test_a_count_of_all_objects_is_right():
    for scene in few_objects(100, 30):
        for asked in questions_about(scene, 8):
            if asked.words[:2] == ("how", "many") and asked.words[2] in ("objects", "things"):
                assert ANSWERS[asked.answer] == str(len(scene.objects))


def test_an_answer_of_one_word_is_that_word_and_of_two_an_entry(scenes):
    vocabulary = Vocabulary(scenes)
    assert vocabulary.answers[ANSWERS.index("red")] == vocabulary.ids(["red"])[0]
    assert len(set(vocabulary.answers.tolist())) == len(ANSWERS)
    assert vocabulary.ids(["xylophone"]) == [UNKNOWN]
    assert int(vocabulary.answers.max()) < len(vocabulary)


def test_rows_hold_all_questions_of_a_scene_behind_each_other(scenes):
    vocabulary = Vocabulary(scenes)
    texts = questions_of(scenes, [2, 0], vocabulary)
    assert texts.last.shape[1] == len(texts.answers) == 10
    row, place = texts.last
    assert (texts.ids[row, place] == ASK).all()
    words = scenes.questions[2][1].words
    second = texts.ids[0][texts.owner[0] == 1].tolist()
    assert second == [ASK, *vocabulary.ids(words), ASK]
    assert texts.places[0][texts.owner[0] == 1].tolist() == list(range(len(words) + 2))
    assert (texts.ids[~texts.known] == PAD).all()
    assert texts.answers[5] == scenes.questions[0][0].answer


def test_captions_are_followed_by_their_end(scenes):
    texts = captions_of(scenes, [1, 3], Vocabulary(scenes))
    following = texts.following
    assert (texts.ids[:, 0] == DESCRIBE).all()
    row, place = texts.last
    assert (following[row, place] == END).all()
    assert torch.equal(following[0, : place[0]], texts.ids[0, 1 : place[0] + 1])
    assert (following[~texts.known] == PAD).all()
    taken = texts.take(torch.tensor([1, 1, 0]))
    assert torch.equal(taken.ids[0], texts.ids[1])
    assert taken.last[1].tolist() == [int(place[1]), int(place[1]), int(place[0])]


def test_features_are_standardised_over_the_first_split(scenes):
    learned, same = standardise([scenes, scenes])
    values = learned.features.float().flatten(0, 1)
    assert values.mean(0).abs().max() < 1e-3
    assert (values.std(0) - 1).abs().max() < 1e-2
    assert torch.equal(learned.features, same.features)


def test_the_most_frequent_answer_of_a_skill(scenes):
    said = most_frequent(scenes)
    sizes = [a.answer for one in scenes.questions for a in one if a.skill == "size"]
    assert sizes.count(said["size"]) == max(sizes.count(one) for one in sizes)
