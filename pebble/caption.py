"""Sentences that a scene determines: captions, lists, names of objects; knows scenes, no questions.

Every scene has exactly one wording of each kind, so that an answer can be compared word for word.
"""

from collections.abc import Sequence

from pebble.scene import Object, Scene, Writing

TOO_SMALL = "too small to read"
_PREPOSITIONS = {"left": "on the left", "right": "on the right", "centre": "in the centre"}


def at_place(place: str) -> str:
    """Return the place with its preposition: "at the top left", "in the centre"."""
    return _PREPOSITIONS.get(place, f"at the {place}")


def with_article(phrase: str) -> str:
    """Return the phrase after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def joined(phrases: Sequence[str]) -> str:
    """One sentence part of several: "x", "x and y", "x, y and z"."""
    if len(phrases) < 2:
        return "".join(phrases)
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def short_name(item: Object) -> str:
    """Colour and shape: "a red circle"."""
    return with_article(f"{item.colour} {item.shape}")


def full_name(item: Object) -> str:
    """Everything: "a large red circle at the top left"."""
    return f"a {item.size} {item.colour} {item.shape} {at_place(item.place)}"


def _written(writing: Writing) -> str:
    """Return what is written: "the number 42"."""
    if writing.is_small:
        return f"text {TOO_SMALL}"
    return f"the {'number' if writing.is_number else 'word'} {writing.text}"


def caption(scene: Scene) -> str:
    """Return the complete description, objects in reading order.

    This is what the tower is trained on and what "Describe the image." is answered with.
    """
    if scene.writing is not None:
        return joined([f"{_written(one)} in {one.colour}" for one in scene.writings])
    if scene.digit is not None:
        return f"a handwritten {scene.digit.value} in {scene.digit.colour}"
    return joined([full_name(item) for item in scene.objects])


def listing(scene: Scene) -> str:
    """Return the short description, which "What is in this picture?" is answered with."""
    if scene.writing is not None:
        return joined([_written(one) for one in scene.writings])
    if scene.digit is not None:
        return f"a handwritten {scene.digit.value}"
    return joined([short_name(item) for item in scene.objects])
