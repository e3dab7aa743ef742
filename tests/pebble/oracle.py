"""Answers from the English of a question and the geometry of its scene, by code of its own."""

import re
from dataclasses import dataclass

from pebble.palette import COLOURS
from pebble.scene import SHAPES, Object, Scene

PLACE = (
    r"(?:at the|on the|in the) "
    r"(top left|top right|bottom left|bottom right|top|bottom|left|right|centre)"
)
SIDE = r"(?:to the |on the )?(left of|right of)|(above|over|below|under)"
NOUNS = {"object", "thing", "shape", "objects", "things", "shapes"}
PLURALS = {f"{shape}s": shape for shape in SHAPES} | {"crosses": "cross"}


@dataclass
class Verdict:
    """An answer, and the object that "it" means afterwards."""

    answer: str
    about: Object | None = None


class DoubtError(AssertionError):
    """A person could not answer this for certain."""


def place_of(item: Object) -> str:
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    for value in item.centre:
        if min(abs(value - 1 / 3), abs(value - 2 / 3)) < 0.04:
            raise DoubtError(f"{item} lies between two places")
    name = f"{rows[int(item.centre[0] * 3)]} {columns[int(item.centre[1] * 3)]}".strip()
    return name or "centre"


def found_at(scene: Scene, place: str) -> list[Object]:
    for item in scene.objects:
        if place != place_of(item) and place in place_of(item).split():
            raise DoubtError(f"{item} is also somewhere {place}")
    return [item for item in scene.objects if place_of(item) == place]


def on_side(item: Object, other: Object, side: str) -> bool:
    axis = 1 if side in ("left of", "right of") else 0
    gap = other.centre[axis] - item.centre[axis]
    if side in ("right of", "below", "under"):
        gap = -gap
    if 0.06 < abs(gap) < 0.2:
        raise DoubtError(f"{item} is neither level with {other} nor clearly {side} it")
    return gap > 0.1


def select(scene: Scene, words: list[str]) -> list[Object]:
    found = list(scene.objects)
    for word in words:
        word = PLURALS.get(word, word)
        if word in COLOURS:
            found = [item for item in found if item.colour == word]
        elif word in SHAPES:
            found = [item for item in found if item.shape == word]
        elif word in ("small", "large"):
            found = [item for item in found if (item.diameter > 0.22) == (word == "large")]
        elif word not in NOUNS:
            raise AssertionError(f"unknown word {word!r}")
    return found


def the_one(scene: Scene, phrase: str, it: Object | None) -> Object | None:
    """The object that a definite phrase means, None where there is none."""
    if phrase == "it" and it is not None:
        return it
    at = re.fullmatch(rf"the object {PLACE}", phrase)
    found = (
        found_at(scene, at[1])
        if at
        else select(scene, [] if phrase == "it" else phrase.removeprefix("the ").split())
    )
    if len(found) > 1:
        raise DoubtError(f"{phrase!r} fits {len(found)} objects")
    return found[0] if found else None


def short(item: Object) -> str:
    return f"{'an' if item.colour == 'orange' else 'a'} {item.colour} {item.shape}"


def listed(phrases: list[str]) -> str:
    return re.sub(r", ([^,]*)$", r" and \1", ", ".join(phrases)) or "nothing"


def in_order(scene: Scene) -> list[Object]:
    return sorted(scene.objects, key=lambda o: (int(o.centre[0] * 3), int(o.centre[1] * 3)))


def answer(scene: Scene, text: str, skill: str, it: Object | None) -> Verdict:
    """The answer to a question.

    Args:
        scene: the picture.
        text: the question.
        skill: decides only between a short and a full description.
        it: what "it" means.
    """
    text = text.rstrip("?.").lower()
    if skill in ("describe", "list"):
        first = in_order(scene)[0] if scene.objects else None
        return Verdict(description(scene, full=skill == "describe"), first)
    if skill in ("reading", "digit"):
        return Verdict(scene.writing.text if scene.writing else str(scene.digit.value))
    if "digit" in text and "colour" not in text and "color" not in text and scene.objects:
        return Verdict("there is no digit")
    if "text" in text and scene.objects:
        return Verdict("there is no text")
    counted = re.search(
        r"(?:how many|count the|number of) ((?:\w+ )*?\w+?)(?: are| do| can| in|$)", text
    )
    if counted:
        return Verdict(str(len(select(scene, counted[1].split()))))
    return about_place(scene, text, it) or about_one(scene, text, it)


def about_place(scene: Scene, text: str, it: Object | None) -> Verdict | None:
    """Sides, places, existence; None for questions after an attribute."""
    side = re.search(rf"(?:is|see) (the .*?) ({SIDE}) (it|the .*?)(?: in the picture)?$", text)
    if side and not text.startswith(("what", "which", "and")):
        item, other = the_one(scene, side[1], it), the_one(scene, side[5], it)
        return Verdict(yes(on_side(item, other, side[3] or side[4])), item)
    side = re.search(rf"({SIDE}) (it|the .*)$", text)
    if side and not text.endswith("the picture"):
        other = the_one(scene, side[4], it)
        if other is None:
            return Verdict(f"there is no {side[4].removeprefix('the ')}")
        beside = [
            item
            for item in in_order(scene)
            if item is not other and on_side(item, other, side[2] or side[3])
        ]
        return Verdict(listed([short(item) for item in beside]), beside[0] if beside else None)
    text = text.removesuffix(" of the picture")
    at = re.search(rf"(?:anything|something|an object) {PLACE}$", text)
    if at:
        return Verdict(yes(bool(found_at(scene, at[1]))))
    at = re.search(rf"(?:what is|see|which object is) {PLACE}$", text)
    if at:
        found = found_at(scene, at[1])
        return Verdict(listed([short(item) for item in found]), found[0] if found else None)
    thing = re.search(r"\ban? ((?:\w+ )*?\w+?)(?: in the picture| in this image)?$", text)
    if thing and " one" not in text:
        return Verdict(yes(bool(select(scene, thing[1].split()))))
    return None


def about_one(scene: Scene, text: str, it: Object | None) -> Verdict:
    """Colour, shape, size and place of one object, or whether it has them."""
    if not scene.objects and re.search(r"\b(it|the word|the number|the digit)\b", text):
        mark = scene.writing or scene.digit
        return Verdict(mark.colour)
    found = re.search(
        rf"\b(it\b|the object {PLACE}\b"
        r"|the (?!colour|shape of|size|place|picture|image)(?:\w+ )*?"
        rf"(?:{'|'.join(SHAPES)}|object|thing|shape)\b)",
        text,
    )
    assert found, text
    item = the_one(scene, found[1], it)
    if item is None:
        return Verdict(f"there is no {found[1].removeprefix('the ')}")
    rest = text.replace(found[1], "", 1)
    if "small" in rest and "large" in rest:
        return Verdict(item.size, item)
    if re.match(r"is ", rest):
        said = [word for word in rest.split() if word in (*COLOURS, "small", "large")]
        return Verdict(yes(said[0] in (item.colour, item.size)), item)
    if "where" in rest or "part" in rest or "place" in rest:
        return Verdict(place_of(item), item)
    if "colour" in rest or "color" in rest:
        return Verdict(item.colour, item)
    if "shape" in rest:
        return Verdict(item.shape, item)
    assert "size" in rest or "big" in rest or "large" in rest, text
    return Verdict("large" if item.diameter > 0.22 else "small", item)


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def description(scene: Scene, *, full: bool) -> str:
    mark = scene.writing or scene.digit
    tail = f" in {mark.colour}" if mark and full else ""
    if scene.writing:
        kind = "number" if scene.writing.text.isdigit() else "word"
        return f"the {kind} {scene.writing.text}{tail}"
    if scene.digit:
        return f"a handwritten {scene.digit.value}{tail}"
    if not full:
        return listed([short(item) for item in in_order(scene)])
    phrases = []
    for item in in_order(scene):
        place = place_of(item)
        word = {"left": "on", "right": "on", "centre": "in"}.get(place, "at")
        phrases.append(f"a {item.size} {item.colour} {item.shape} {word} the {place}")
    return listed(phrases)
