from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageFont

from lapilli.geometry import ImageSize
from pebble.caption import TOO_SMALL, caption, listing
from pebble.draw import draw, model_pixels
from pebble.glyphs import BITMAP_FONT, BITMAP_POINTS, glyphs, writing_mask
from pebble.palette import MIN_LIGHTNESS, lab
from pebble.pool import PoolSpec
from pebble.questions import read
from pebble.regions import LEXICON, region_words
from pebble.sample import sample_scene
from pebble.scene import WORDS, Finish
from pebble.typed import (
    READABLE,
    TYPED_SHARE,
    crowded_type,
    typed_scene,
    wide_scene,
)

NUM_SCENES = 300


@pytest.fixture(scope="module")
def scenes():
    return [typed_scene(seed) for seed in range(NUM_SCENES)]


def model_points(scene):
    return scene.writing.points * 128 / max(scene.size)


@pytest.mark.slow
def test_a_seed_gives_the_same_scene_every_time(scenes):
    assert [typed_scene(seed) for seed in range(40)] == scenes[:40]
    assert len({repr(scene) for scene in scenes}) == NUM_SCENES


def test_numbers_and_words_in_every_font_occur(scenes):
    fonts = Counter(scene.writing.font for scene in scenes)
    assert set(fonts) == set(range(BITMAP_FONT + 1))
    assert fonts[0] > 0.4 * NUM_SCENES, "most are in the font that a person's program gets"
    texts = {scene.writing.text for scene in scenes}
    assert texts - set(WORDS)
    assert texts >= set(WORDS)
    numbers = np.mean([scene.writing.is_number for scene in scenes])
    assert 0.5 < numbers < 0.75


def test_pictures_have_the_sizes_that_people_choose(scenes):
    sizes = Counter(tuple(reversed(scene.size)) for scene in scenes)
    assert sizes[200, 100] >= 8
    assert {(300, 100), (640, 480), (100, 100)} <= set(sizes)
    assert len(sizes) > 60, "and any other"
    assert max(w / h for w, h in sizes) >= 3


def test_type_has_any_size_that_fits_and_what_cannot_be_read_says_so(scenes):
    sizes = np.array([model_points(scene) for scene in scenes])
    small = np.array([scene.writing.is_small for scene in scenes])
    assert (small == (sizes < READABLE)).all()
    assert 0.15 < small.mean() < 0.4
    assert (sizes < 8).mean() > 0.03
    assert ((sizes > READABLE) & (sizes < 40)).mean() > 0.3
    assert sizes.max() > 70
    for scene in scenes:
        mask, _ = writing_mask(scene.writing, scene.size)
        assert mask.width <= scene.size.width
        assert mask.height <= scene.size.height


def test_paper_has_every_brightness_and_ink_can_be_seen_on_it(scenes):
    grounds = Counter(scene.background.near for scene in scenes)
    assert grounds[255, 255, 255] > 80
    assert grounds[0, 0, 0] > 15
    assert len(grounds) > 60
    for scene in scenes:
        for ground in (scene.background.near, scene.background.far):
            assert abs(lab(scene.writing.rgb)[0] - lab(ground)[0]) >= MIN_LIGHTNESS


@pytest.mark.parametrize("points", [16, 24, 40, 60])
def test_the_default_font_is_drawn_as_pillow_draws_it(points):
    """The picture of a person's program: the same pixels at the size that the font is set in."""
    base = typed_scene(0)
    writing = replace(
        base.writing, text="42", drawn="42", font=0, points=points, rgb=(0, 0, 0), centre=(0.5, 0.5)
    )
    white = (255, 255, 255)
    scene = replace(
        base,
        size=ImageSize(height=100, width=200),
        writing=writing,
        finish=Finish(jpeg_quality=None, blur=0.0),
        background=replace(base.background, texture="plain", near=white, far=white),
    )
    found = draw(scene)
    box = ImageChops.invert(found.convert("L")).getbbox()
    font = ImageFont.load_default(points)
    left, top, *_ = font.getbbox("42")
    theirs = Image.new("RGB", (200, 100), "white")
    corner = (box[0] - left, box[1] - top)
    ImageDraw.Draw(theirs).text(corner, "42", fill="black", font=font)
    ink = ImageChops.invert(theirs.convert("L")).getbbox()
    moved = Image.new("RGB", (200, 100), "white")
    moved.paste(theirs, (box[0] - ink[0], box[1] - ink[1]))
    assert np.abs(np.asarray(found, int) - np.asarray(moved, int)).max() <= 1


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_every_glyph_lies_in_its_picture_and_names_a_patch(seed):
    scene = typed_scene(seed)
    marks = glyphs(scene)
    assert "".join(mark.text for mark in marks) == scene.writing.text
    for mark in marks:
        assert -0.03 < (mark.top + mark.bottom) / 2 < 1.03
        assert -0.03 < (mark.left + mark.right) / 2 < 1.03
    words = region_words(scene, 8)
    named = {LEXICON[i] for i in np.flatnonzero(words.any((0, 1)))}
    if scene.writing.is_small:
        assert {"small type", scene.writing.colour} <= named
        assert not any(name.startswith(("units:", "letter:")) for name in named)
    else:
        assert ("number" if scene.writing.is_number else "word") in named
        assert any(name.startswith(("units:", "letter:")) for name in named)
    assert model_pixels(draw(scene), 128).std() > 0


def test_what_is_too_small_is_asked_and_told(scenes):
    small = next(scene for scene in scenes if scene.writing.is_small)
    rng = np.random.default_rng(0)
    assert read(small, rng).answer == TOO_SMALL == "too small to read"
    assert caption(small) == f"text too small to read in {small.writing.colour}"
    assert listing(small) == "text too small to read"


def test_bitmap_type_has_its_one_size(scenes):
    bitmaps = [scene for scene in scenes if scene.writing.font == BITMAP_FONT]
    assert {scene.writing.points for scene in bitmaps} == {BITMAP_POINTS}
    assert any(scene.writing.is_small for scene in bitmaps)
    assert any(not scene.writing.is_small for scene in bitmaps)


@pytest.mark.slow
def test_the_wide_world_adds_type_to_the_scenes_of_before():
    scenes = [wide_scene(seed) for seed in range(NUM_SCENES)]
    typed = [scene.writing is not None and scene.writing.points > 0 for scene in scenes]
    assert abs(np.mean(typed) - TYPED_SHARE) < 0.08
    for seed, is_typed in enumerate(typed):
        expected = typed_scene(seed) if is_typed else sample_scene(seed)
        assert scenes[seed] == expected


@pytest.mark.slow
def test_crowds_of_type_do_not_overlap_and_say_what_is_where():
    number = []
    for seed in range(40):
        scene = crowded_type(seed)
        number.append(len(scene.writings))
        boxes = []
        for writing in scene.writings:
            mask, (y, x) = writing_mask(writing, scene.size)
            tall, wide = mask.height / scene.size.height, mask.width / scene.size.width
            boxes.append((y - tall / 2, x - wide / 2, y + tall / 2, x + wide / 2))
        for i, one in enumerate(boxes):
            for other in boxes[:i]:
                apart = one[0] >= other[2] or other[0] >= one[2]
                assert apart or one[1] >= other[3] or other[1] >= one[3]
        words = region_words(scene, 8)
        named = {LEXICON[i] for i in np.flatnonzero(words.any((0, 1)))}
        for writing in scene.writings:
            if not writing.is_small:
                name = f"units:{writing.text[-1]}" if writing.is_number else f"word:{writing.text}"
                assert name in named
            assert writing.text in caption(scene) or writing.is_small
    assert np.mean(number) > 4


@pytest.mark.slow
def test_only_crowds_hold_several_lines_of_type():
    assert not any(wide_scene(seed).more for seed in range(100))
    crowds = [wide_scene(seed, crowds=True) for seed in range(100)]
    assert sum(bool(scene.more) for scene in crowds) > 40
    assert sum(len(scene.objects) > 5 for scene in crowds) > 15


def test_pools_hold_the_wide_world():
    spec = PoolSpec(first_seed=0, num_scenes=1, side=16)
    assert [spec.scene(seed) for seed in range(30)] == [wide_scene(seed) for seed in range(30)]
