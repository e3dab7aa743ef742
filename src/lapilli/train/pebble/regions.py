"""What every patch of a picture lies on, in words: the captioning targets of the tower; knows scenes, no model.

A caption says everything about a picture once; here each patch gets the words of the caption that are about its own
place. The words are one fixed lexicon, so the targets of a patch are one row of ones and zeros.

    patch on a large red circle at the top left  ->  large red circle top-left      (and "middle" in the patch
    patch of a picture with the number 42        ->  number tens:4 units:2 red       that holds its centre)
    any patch                                    ->  how many objects there are
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from lapilli.train.pebble.palette import COLOURS
from lapilli.train.pebble.scene import MAX_OBJECTS, PLACES, SHAPES, SIZES, WORDS, Object, Scene

LEXICON: Final[tuple[str, ...]] = (
    *COLOURS,
    *SHAPES,
    *SIZES,
    *PLACES,
    "middle",
    *(f"objects:{number}" for number in range(MAX_OBJECTS + 1)),
    *("word", "number", "handwritten"),
    *(f"word:{word}" for word in WORDS),
    *(f"tens:{digit}" for digit in range(1, 10)),
    *(f"units:{digit}" for digit in range(10)),
    *(f"digit:{digit}" for digit in range(10)),
)
_INDEX: Final = {word: i for i, word in enumerate(LEXICON)}


def region_words(scene: Scene, side: int) -> NDArray[np.bool_]:
    """Words of every patch, bool [side, side, len(LEXICON)], of the picture padded to a square.

    Args:
        scene: what the picture shows.
        side: patches of one row of the padded picture.

    """
    words = np.zeros((side, side, len(LEXICON)), dtype=np.bool_)
    words[:, :, _INDEX[f"objects:{len(scene.objects)}"]] = True
    for name in mark_words(scene):
        words[:, :, _INDEX[name]] = True
    for item in scene.objects:
        covered, middle = _patches(scene, item, side)
        for name in object_words(item):
            words[covered, _INDEX[name]] = True
        words[(*middle, _INDEX["middle"])] = True
    return words


def object_words(item: Object) -> tuple[str, ...]:
    """The words of an object."""
    return item.size, item.colour, item.shape, item.place


def mark_words(scene: Scene) -> list[str]:
    """The words of the writing or digit that fills the picture; none in a scene of objects."""
    if scene.digit is not None:
        return ["handwritten", f"digit:{scene.digit.value}", scene.digit.colour]
    if scene.writing is None:
        return []
    text = scene.writing.text
    if not scene.writing.is_number:
        return ["word", f"word:{text}", scene.writing.colour]
    tens = [f"tens:{text[0]}"] if len(text) == 2 else []
    return ["number", *tens, f"units:{text[-1]}", scene.writing.colour]


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
