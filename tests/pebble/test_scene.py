import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.geometry import ImageSize
from pebble.digits import digit_scans, digit_split
from pebble.palette import COLOURS, MIN_CONTRAST, contrast, lab, shade
from pebble.sample import MAX_SIDE, MIN_SIDE, sample_scene
from pebble.scene import DIAMETERS, MAX_OBJECTS, PLACES, WORDS, Scene, unit_length

NUM_SCENES = 300


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed) for seed in range(NUM_SCENES)]


@pytest.mark.slow
def test_a_seed_gives_the_same_scene_every_time(scenes):
    assert [sample_scene(seed) for seed in range(NUM_SCENES)] == scenes
    assert len({repr(scene) for scene in scenes}) == NUM_SCENES


def test_every_kind_occurs_and_excludes_the_others(scenes):
    kinds = [
        (bool(scene.objects), scene.writing is not None, scene.digit is not None)
        for scene in scenes
    ]
    assert all(sum(kind) == 1 for kind in kinds)
    shares = np.mean(kinds, axis=0)
    assert 0.6 < shares[0] < 0.85
    assert min(shares[1:]) > 0.08


def test_pictures_keep_to_the_sizes_and_aspects_of_the_world(scenes):
    for scene in scenes:
        assert min(scene.size) >= MIN_SIDE
        assert max(scene.size) <= MAX_SIDE
        assert max(scene.size) / min(scene.size) < 2.05
    assert max(max(scene.size) for scene in scenes) > 500
    assert min(min(scene.size) for scene in scenes) < 80


def test_every_number_of_objects_is_about_equally_likely(scenes):
    numbers = np.bincount([len(scene.objects) for scene in scenes if scene.objects])[1:]
    assert len(numbers) == MAX_OBJECTS
    assert numbers.min() > 0.5 * numbers.mean()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_objects_touch_neither_each_other_nor_the_edge(seed):
    scene = sample_scene(seed, "objects")
    height, width = scene.size
    for item in scene.objects:
        reach = 0.5 * item.diameter * scene.unit
        y, x = item.centre[0] * height, item.centre[1] * width
        assert reach < y < height - reach
        assert reach < x < width - reach
        for other in scene.objects:
            if other is not item:
                far = 0.5 * other.diameter * scene.unit
                gap = np.hypot(y - other.centre[0] * height, x - other.centre[1] * width)
                assert gap > reach + far


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_place_size_and_colour_can_be_told_without_doubt(seed):
    scene = sample_scene(seed, "objects")
    assert len({item.cell for item in scene.objects}) == len(scene.objects)
    for item in scene.objects:
        for centre, cell in zip(item.centre, (item.row, item.column), strict=True):
            assert abs(centre - (cell + 0.5) / 3) < 0.12, "closer to its cell than to the next"
        assert PLACES[3 * item.row + item.column] == item.place
        low, high = DIAMETERS[item.size]
        assert low <= item.diameter <= high
        grounds = (scene.background.near, scene.background.far)
        assert min(contrast(item.rgb, back) for back in grounds) >= MIN_CONTRAST
    assert [item.cell for item in scene.objects] == sorted(item.cell for item in scene.objects)


def test_small_and_large_do_not_meet():
    assert DIAMETERS["large"][0] > 1.5 * DIAMETERS["small"][1]


def test_shades_are_nearest_to_shades_of_their_own_name():
    rng = np.random.default_rng(0)
    known = [(name, lab(shade(name, rng))) for name in COLOURS for _ in range(60)]
    for name in COLOURS:
        for _ in range(30):
            point = lab(shade(name, rng))
            nearest = min(known, key=lambda entry: math.dist(entry[1], point))
            assert nearest[0] == name


def test_lab_of_black_and_white():
    np.testing.assert_allclose(lab((0, 0, 0)), 0, atol=1e-6)
    np.testing.assert_allclose(lab((255, 255, 255)), [100, 0, 0], atol=0.02)
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(100, abs=0.02)


def test_writing_is_a_known_word_or_a_number_below_100(scenes):
    texts = [scene.writing for scene in scenes if scene.writing is not None]
    assert {writing.is_number for writing in texts} == {True, False}
    for writing in texts:
        assert writing.drawn.lower() == writing.text
        assert (writing.is_number and int(writing.text) < 100) or writing.text in WORDS


def test_unit_is_the_root_of_the_area_unless_the_picture_is_long():
    assert unit_length(ImageSize(height=100, width=121)) == pytest.approx(110)
    assert unit_length(ImageSize(height=100, width=200)) == pytest.approx(120)


@pytest.mark.slow
def test_no_held_out_digit_is_ever_in_a_training_scene():
    training, held_out = digit_split()
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == list(range(1797))
    assert len(held_out) == 359
    drawn = {
        scene.digit.index
        for scene in (sample_scene(seed, "digit") for seed in range(400))
        if scene.digit is not None
    }
    assert not drawn & set(held_out)
    assert len(drawn) > 300


def test_held_out_digits_hold_every_value():
    values = np.bincount([digit_scans()[1][index] for index in digit_split()[1]])
    assert len(values) == 10
    assert values.min() > 20


def test_a_given_scan_is_shown():
    scene = sample_scene(5, digit_index=1234)
    assert scene.digit is not None
    assert scene.digit.index == 1234
    assert scene.digit.value == digit_scans()[1][1234]


@pytest.mark.slow
def test_crowds_hold_more_objects_and_change_nothing_else():
    usual = [sample_scene(seed) for seed in range(90)]
    crowds = [sample_scene(seed, crowds=True) for seed in range(90)]
    for seed, (one, other) in enumerate(zip(usual, crowds, strict=True)):
        if not one.objects or seed % 3 == 0:
            assert one == other
        else:
            assert 6 <= len(other.objects) <= 9
            assert len({item.cell for item in other.objects}) == len(other.objects)
