"""What every patch of a picture lies on, in words: what the tower learns to name.

A caption says everything about a picture once; here each patch gets the words of the caption that
are about its own place. The words are one fixed lexicon, so the targets of a patch are one row of
ones and zeros.

    a large red circle at the top left   large red circle top-left; "middle" where its centre lies
    the number 42                        number red, tens:4 under the 4, units:2 under the 2
    the word cat                         word red word:cat, letter:c under the c, ...
    text too small to read               small type, red
    any patch                            how many objects there are
"""

import string
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lapilli.geometry import ImageSize
from pebble.glyphs import Glyph, characters, glyphs
from pebble.palette import COLOURS
from pebble.scene import (
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    WORDS,
    Object,
    Scene,
    Writing,
)

MARKS: Final = ("word", "number", "handwritten", "small type")
LEXICON: Final[tuple[str, ...]] = (
    *COLOURS,
    *SHAPES,
    *SIZES,
    *PLACES,
    "middle",
    *(f"objects:{number}" for number in range(MAX_OBJECTS + 1)),
    *MARKS,
    *(f"word:{word}" for word in WORDS),
    *(f"tens:{digit}" for digit in range(1, 10)),
    *(f"units:{digit}" for digit in range(10)),
    *(f"digit:{digit}" for digit in range(10)),
    *(f"letter:{letter}" for letter in string.ascii_lowercase),
)
_INDEX: Final = {word: i for i, word in enumerate(LEXICON)}


def region_words(scene: Scene, side: int) -> NDArray[np.bool_]:
    """Words of every patch, bool [side, side, len(LEXICON)], of the picture padded to a square.

    Args:
        scene: what the picture shows.
        side: patches of one row of the padded picture.
    """
    words = np.zeros((side, side, len(LEXICON)), dtype=np.bool_)
    if len(scene.objects) <= MAX_OBJECTS:
        words[:, :, _INDEX[f"objects:{len(scene.objects)}"]] = True
    for glyph, names in mark_words(scene):
        covered = _under(scene, glyph, side)
        for name in names:
            words[covered, _INDEX[name]] = True
    for item in scene.objects:
        covered, middle = _patches(scene, item, side)
        for name in object_words(item):
            words[covered, _INDEX[name]] = True
        words[middle[0], middle[1], _INDEX["middle"]] = True
    return words


def shown_patches(scene: Scene, item: Object | Glyph, side: int) -> NDArray[np.bool_]:
    """Patches of this object or character alone, and the one that holds its centre."""
    if isinstance(item, Glyph):
        return _under(scene, item, side)
    covered, middle = _patches(scene, item, side)
    for other in scene.objects:
        if other is not item:
            covered &= ~_patches(scene, other, side)[0]
    covered[middle] = True
    return covered


def object_words(item: Object) -> tuple[str, ...]:
    """Return the words of an object."""
    return item.size, item.colour, item.shape, item.place


def mark_words(scene: Scene) -> Iterator[tuple[Glyph, list[str]]]:
    """Every character of the writing, or the digit, with its words; none in a scene of objects."""
    if scene.digit is not None:
        names = ["handwritten", f"digit:{scene.digit.value}", scene.digit.colour]
        yield glyphs(scene)[0], names
    for writing in scene.writings:
        yield from _character_words(writing, scene.size)


def _character_words(writing: Writing, size: ImageSize) -> Iterator[tuple[Glyph, list[str]]]:
    marks = characters(writing, size)
    for i, glyph in enumerate(marks):
        if writing.is_small:
            yield glyph, ["small type", writing.colour]
        elif writing.is_number:
            place = "units" if i == len(marks) - 1 else "tens"
            yield glyph, ["number", f"{place}:{glyph.text}", writing.colour]
        else:
            whole, letter = f"word:{writing.text}", f"letter:{glyph.text}"
            yield glyph, ["word", whole, letter, writing.colour]


def _under(scene: Scene, glyph: Glyph, side: int) -> NDArray[np.bool_]:
    """Patches whose middle lies under the character, or the one that holds its own middle."""
    height, width = scene.size
    longest = max(height, width)
    to_patches = side / longest
    top, bottom = (
        (share * height + (longest - height) / 2) * to_patches
        for share in (glyph.top, glyph.bottom)
    )
    left, right = (
        (share * width + (longest - width) / 2) * to_patches for share in (glyph.left, glyph.right)
    )
    steps = np.arange(side) + 0.5
    rows = (steps >= top) & (steps <= bottom)
    columns = (steps >= left) & (steps <= right)
    rows[min(int((top + bottom) / 2), side - 1)] = True
    columns[min(int((left + right) / 2), side - 1)] = True
    covered: NDArray[np.bool_] = rows[:, None] & columns[None, :]
    return covered


def _patches(scene: Scene, item: Object, side: int) -> tuple[NDArray[np.bool_], tuple[int, int]]:
    """Patches that the object covers, bool [side, side], and the one that holds its centre."""
    height, width = scene.size
    longest = max(height, width)
    y = (item.centre[0] * height + (longest - height) / 2) / longest * side
    x = (item.centre[1] * width + (longest - width) / 2) / longest * side
    reach = item.diameter * scene.unit / longest * side / 2 + 0.25  # a quarter of a patch beyond
    steps = np.arange(side) + 0.5
    covered = np.hypot(steps[:, None] - y, steps[None, :] - x) <= reach
    middle = (min(int(y), side - 1), min(int(x), side - 1))
    covered[middle] = True
    return covered, middle
