import numpy as np
import pytest

from pebble.regions import LEXICON, region_words
from pebble.sample import sample_scene
from pebble.scene import MAX_OBJECTS

SIDE = 8


def named(words):
    return {LEXICON[i] for i in np.flatnonzero(words)}


def test_the_lexicon_names_everything_once():
    assert len(set(LEXICON)) == len(LEXICON)


@pytest.mark.slow
def test_every_object_is_named_where_its_middle_lies():
    for seed in range(60):
        scene = sample_scene(seed, "objects")
        words = region_words(scene, SIDE)
        middles = words[:, :, LEXICON.index("middle")]
        assert 1 <= middles.sum() <= len(scene.objects)
        seen = [named(patch) for patch in words[middles]]
        for item in scene.objects:
            own = {item.size, item.colour, item.shape, item.place, "middle"}
            assert any(own <= patch for patch in seen), (seed, item)
            assert f"objects:{len(scene.objects)}" in named(words[0, 0])


@pytest.mark.slow
def test_padding_moves_the_patches():
    seeds = [
        s
        for s in range(300)
        if sample_scene(s, "objects").size.width > 1.6 * sample_scene(s, "objects").size.height
    ]
    assert seeds
    for seed in seeds:
        covered = region_words(sample_scene(seed, "objects"), SIDE)[:, :, : LEXICON.index("middle")]
        assert not covered[0].any()
        assert not covered[-1].any()


@pytest.mark.slow
def test_characters_are_named_where_they_stand():
    for seed in range(60):
        scene = sample_scene(seed, "writing")
        words = named(region_words(scene, SIDE).any((0, 1)))
        text = scene.writing.text
        if scene.writing.is_number:
            assert {"number", f"units:{text[-1]}", scene.writing.colour} <= words
            assert (f"tens:{text[0]}" in words) is (len(text) == 2)
        else:
            assert {"word", f"word:{text}", *(f"letter:{one}" for one in text)} <= words
        assert not any(name.startswith("digit:") for name in words)


@pytest.mark.slow
def test_the_tens_stand_left_of_the_units():
    for seed in range(80):
        scene = sample_scene(seed, "writing")
        if not scene.writing.is_number or len(scene.writing.text) < 2:
            continue
        words = region_words(scene, SIDE)
        tens = words[:, :, LEXICON.index(f"tens:{scene.writing.text[0]}")].any(0)
        units = words[:, :, LEXICON.index(f"units:{scene.writing.text[1]}")].any(0)
        assert np.flatnonzero(tens).mean() < np.flatnonzero(units).mean()


def test_a_digit_is_named_and_has_no_place():
    scene = sample_scene(3, "digit")
    words = named(region_words(scene, SIDE).any((0, 1)))
    assert words == {"handwritten", f"digit:{scene.digit.value}", scene.digit.colour, "objects:0"}


def test_crowds_are_not_counted():
    scene = next(
        s for s in (sample_scene(i, crowds=True) for i in range(99)) if len(s.objects) > MAX_OBJECTS
    )
    assert not any(
        name.startswith("objects:") for name in named(region_words(scene, SIDE).any((0, 1)))
    )
