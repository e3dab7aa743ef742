"""The built-in samples: the same every time, of many kinds, and true."""

import numpy as np
import pytest

from lapilli.calibration.builtin import COLOURS, PLACES, builtin_samples, builtin_text


def test_they_are_the_same_every_time():
    for one, other in zip(builtin_samples(4), builtin_samples(6), strict=False):
        assert [m.text for m in one.messages] == [m.text for m in other.messages]
        assert np.array_equal(np.asarray(one.media[0].source), np.asarray(other.media[0].source))


def test_every_answer_is_about_the_picture_that_is_shown():
    """A shape in the middle of its place has the colour that the answer names."""
    checked = 0
    for sample in builtin_samples(24):
        assert [message.role for message in sample.messages] == ["user", "assistant"] * 2
        (part,) = sample.media
        pixels = np.asarray(part.source, dtype=int)
        height, width = pixels.shape[:2]
        said = " ".join(message.text for message in sample.messages if message.role == "assistant")
        for place, share in PLACES.items():
            for colour, wanted in COLOURS.items():
                for shape in ("circle", "square", "triangle"):
                    if f"a {colour} {shape} on the {place}" in said.lower():
                        found = pixels[int(height * 0.45), int(width * share)]
                        assert np.abs(found - wanted).max() < 30, (sample.id, said)
                        checked += 1
    assert checked > 20


def test_pictures_differ_in_size_and_content():
    pictures = [sample.media[0].source for sample in builtin_samples(12)]
    assert len({picture.size for picture in pictures}) > 8
    assert len({picture.tobytes() for picture in pictures}) == 12


def test_the_text_is_long_and_plain():
    text = builtin_text()
    assert len(text) > 300_000
    assert text.isprintable() or "\n" in text


@pytest.mark.parametrize("number", [0, 1])
def test_as_many_as_asked_for(number):
    assert len(list(builtin_samples(number))) == number
