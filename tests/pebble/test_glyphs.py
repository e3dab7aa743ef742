from dataclasses import replace

import numpy as np
import pytest

from pebble.draw import draw
from pebble.glyphs import glyphs
from pebble.sample import sample_scene
from pebble.scene import Background, Finish

WHITE = (255, 255, 255)
PLAIN = Background(texture="plain", near=WHITE, far=WHITE, angle=0.0, strength=0.0)


def black_on_white(seed, kind):
    scene = sample_scene(seed, kind)
    mark = scene.writing or scene.digit
    changes = {"writing" if scene.writing else "digit": replace(mark, rgb=(0, 0, 0))}
    finish = Finish(jpeg_quality=None, blur=0.0)
    return replace(scene, background=PLAIN, finish=finish, **changes)


@pytest.mark.slow
def test_boxes_hold_the_ink_of_their_characters():
    for seed in range(40):
        for kind in ("writing", "digit"):
            scene = black_on_white(seed, kind)
            ink = np.asarray(draw(scene)).min(axis=2) < 128
            boxed = np.zeros_like(ink)
            for glyph in glyphs(scene):
                rows = slice(max(round(glyph.top * ink.shape[0]) - 1, 0), None)
                rows = slice(rows.start, round(glyph.bottom * ink.shape[0]) + 2)
                columns = slice(
                    max(round(glyph.left * ink.shape[1]) - 1, 0),
                    round(glyph.right * ink.shape[1]) + 2,
                )
                assert ink[rows, columns].any()
                boxed[rows, columns] = True
            assert (ink & boxed).sum() > 0.96 * ink.sum(), scene


def test_the_characters_spell_the_writing():
    for seed in range(40):
        scene = sample_scene(seed, "writing")
        assert "".join(glyph.text for glyph in glyphs(scene)) == scene.writing.text
        lefts = [glyph.left for glyph in glyphs(scene)]
        assert lefts == sorted(lefts)


def test_a_digit_is_one_glyph_and_objects_are_none():
    scene = sample_scene(1, "digit")
    assert [glyph.text for glyph in glyphs(scene)] == [str(scene.digit.value)]
    assert glyphs(sample_scene(1, "objects")) == ()
