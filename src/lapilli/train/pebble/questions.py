"""Questions about a scene with exact answers, skill by skill; knows no pixels.

Every function draws one question from a generator and returns None where the scene does not allow
one without doubt: a reference that fits two objects, or two objects that are neither level nor
clearly beside each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from lapilli.train.pebble import phrases
from lapilli.train.pebble.caption import (
    at_place,
    caption,
    joined,
    listing,
    short_name,
    with_article,
)
from lapilli.train.pebble.palette import COLOURS
from lapilli.train.pebble.scene import (
    CLEAR_MARGIN,
    LEVEL_MARGIN,
    PLACES,
    SHAPES,
    SIZES,
    Object,
    Scene,
)

T = TypeVar("T")
Rng = np.random.Generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One turn.

    Attributes:
        skill: one of `SKILLS`.
        about: the object that "it" means in the next turn, or None where nothing was named.
        needs_previous: the question says "it" and means the object of the turn before.

    """

    skill: str
    text: str
    answer: str
    about: Object | None = None
    needs_previous: bool = False


def pick(rng: Rng, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def describe(scene: Scene, rng: Rng) -> Question | None:
    """The complete description."""
    first = scene.objects[0] if scene.objects else None
    return Question(
        skill="describe", text=pick(rng, phrases.DESCRIBE), answer=caption(scene), about=first
    )


def list_objects(scene: Scene, rng: Rng) -> Question | None:
    """What is in the picture, briefly."""
    first = scene.objects[0] if scene.objects else None
    return Question(skill="list", text=pick(rng, phrases.LIST), answer=listing(scene), about=first)


def _matching(
    scene: Scene, *, size: str | None = None, colour: str | None = None, shape: str | None = None
) -> list[Object]:
    return [
        item
        for item in scene.objects
        if size in (None, item.size)
        and colour in (None, item.colour)
        and shape in (None, item.shape)
    ]


def _shown(scene: Scene) -> set[tuple[str | None, str | None]]:
    """Colours, shapes and both together that some object has; None stands for any."""
    return {
        pair
        for item in scene.objects
        for pair in ((item.colour, item.shape), (item.colour, None), (None, item.shape))
    }


def count(scene: Scene, rng: Rng) -> Question | None:
    """How many objects of a kind; 0 is an answer too, and every number is about equally likely."""
    if rng.random() < 0.4 or not scene.objects:
        return Question(
            skill="count", text=pick(rng, phrases.COUNT_ALL), answer=str(len(scene.objects))
        )
    by_number: dict[int, list[str]] = {}
    kinds = [(colour, None) for colour in COLOURS] + [(None, shape) for shape in SHAPES]
    for colour, shape in kinds:
        number = len(_matching(scene, colour=colour, shape=shape))
        by_number.setdefault(number, []).append(_plural(rng, None, colour, shape))
    for size in SIZES:
        number = len(_matching(scene, size=size))
        by_number.setdefault(number, []).append(_plural(rng, size, None, None))
    for item in scene.objects:
        number = len(_matching(scene, colour=item.colour, shape=item.shape))
        by_number.setdefault(number, []).append(_plural(rng, None, item.colour, item.shape))
    weights = np.array([1.0 + number for number in by_number])
    number = list(by_number)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    things = pick(rng, by_number[number])
    return Question(
        skill="count", text=pick(rng, phrases.COUNT).format(things=things), answer=str(number)
    )


def _plural(rng: Rng, size: str | None, colour: str | None, shape: str | None) -> str:
    noun = _plural_noun(shape) if shape else pick(rng, ("objects", "things", "shapes"))
    return " ".join(word for word in (size, colour, noun) if word)


def _plural_noun(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def reference(scene: Scene, item: Object, rng: Rng, *, hide: str = "") -> str | None:
    """A phrase that means this object and no other, or None.

    Args:
        scene: where the phrase must be unique.
        item: the object meant.
        rng: chooses among the phrases that fit.
        hide: attribute that the phrase may not mention, because it is asked for.

    """
    choices: list[dict[str, str]] = [
        {"shape": item.shape},
        {"colour": item.colour},
        {"colour": item.colour, "shape": item.shape},
        {"size": item.size, "shape": item.shape},
        {"size": item.size, "colour": item.colour, "shape": item.shape},
    ]
    fits = [
        choice for choice in choices if hide not in choice and len(_matching(scene, **choice)) == 1
    ]
    if not fits:
        return None
    return _definite(rng, fits[0] if rng.random() < 0.4 else pick(rng, fits))


def _definite(rng: Rng, choice: dict[str, str]) -> str:
    noun = choice.get("shape") or pick(rng, ("object", "thing", "shape"))
    words = ["the", choice.get("size", ""), choice.get("colour", ""), noun]
    return " ".join(word for word in words if word)


def _about_one(
    scene: Scene, rng: Rng, skill: str, hide: str, wordings: Sequence[str]
) -> Question | None:
    """A question after one attribute of one object, all objects equally likely."""
    if not scene.objects:
        return None
    item = pick(rng, scene.objects)
    if len(scene.objects) == 1 and rng.random() < 0.5:
        name: str | None = pick(rng, ("it", "the object", "the thing", "the shape"))
    elif rng.random() < 0.15 and hide != "place" and is_plain(scene, item.cell):
        name = f"the object {at_place(item.place)}"
    else:
        name = reference(scene, item, rng, hide=hide)
    if name is None or (hide == "shape" and name == "the shape"):
        return None
    answer = str(getattr(item, hide))
    return Question(skill=skill, text=pick(rng, wordings).format(a=name), answer=answer, about=item)


def colour(scene: Scene, rng: Rng) -> Question | None:
    """The colour of an object, a word, a number or a digit."""
    mark = scene.writing or scene.digit
    if mark is not None:
        name = mark_name(scene)
        text = pick(rng, phrases.COLOUR).format(a=pick(rng, (name, name, "it")))
        return Question(skill="colour", text=text, answer=mark.colour)
    return _about_one(scene, rng, "colour", "colour", phrases.COLOUR)


def mark_name(scene: Scene) -> str:
    """What a scene without objects shows: "the word", "the number" or "the digit"."""
    if scene.writing is None:
        return "the digit"
    return "the number" if scene.writing.is_number else "the word"


def shape(scene: Scene, rng: Rng) -> Question | None:
    """The shape of an object."""
    return _about_one(scene, rng, "shape", "shape", phrases.SHAPE)


def size(scene: Scene, rng: Rng) -> Question | None:
    """Whether an object is small or large."""
    return _about_one(scene, rng, "size", "size", phrases.SIZE)


def is_plain(scene: Scene, cell: int) -> bool:
    """Whether a question may name this place.

    An object at the top left is also on the left, so "on the left" is doubtful while it is there.
    """
    taken = {item.cell for item in scene.objects}
    corners = {1: (0, 2), 3: (0, 6), 5: (2, 8), 7: (6, 8)}
    return not taken.intersection(corners.get(cell, ()))


def place(scene: Scene, rng: Rng) -> Question | None:
    """Where an object is, or what is at a place."""
    if not scene.objects:
        return None
    if rng.random() < 0.65:
        return _about_one(scene, rng, "place", "place", phrases.PLACE)
    taken = {item.cell: item for item in scene.objects}
    wants_nothing = rng.random() < 0.2
    cells = [c for c in range(9) if (c not in taken) is wants_nothing and is_plain(scene, c)]
    if not cells:
        return None
    cell = pick(rng, cells)
    found = taken.get(cell)
    return Question(
        skill="place",
        text=pick(rng, phrases.WHAT_AT).format(place=at_place(PLACES[cell])),
        answer="nothing" if found is None else short_name(found),
        about=found,
    )


def sideways(item: Object, other: Object, side: str) -> bool | None:
    """Whether `item` is on that side of `other`; None where a person could not say for certain."""
    vertical = side in ("above", "below")
    steps = other.row - item.row if vertical else other.column - item.column
    axis = 0 if vertical else 1
    gap = other.centre[axis] - item.centre[axis]
    if abs(gap) > LEVEL_MARGIN if steps == 0 else abs(gap) < CLEAR_MARGIN:
        return None
    return (steps if side in ("left", "above") else -steps) > 0


def is_side(scene: Scene, rng: Rng) -> Question | None:
    """Whether one object is left of, right of, above or below another; half the answers are yes."""
    if len(scene.objects) < 2:
        return None
    side = pick(rng, list(phrases.SIDES))
    wanted = bool(rng.random() < 0.5)
    pairs = [
        (item, other)
        for item in scene.objects
        for other in scene.objects
        if item is not other and sideways(item, other, side) is wanted
    ]
    if not pairs:
        return None
    item, other = pick(rng, pairs)
    first, second = reference(scene, item, rng), reference(scene, other, rng)
    if first is None or second is None:
        return None
    words = pick(rng, phrases.SIDES[side])
    return Question(
        skill="relation",
        text=pick(rng, phrases.IS_SIDE).format(a=first, b=second, side=words),
        answer="yes" if wanted else "no",
        about=item,
    )


def beside(scene: Scene, other: Object, side: str) -> list[Object] | None:
    """Every object on that side of `other` in reading order, or None where one is doubtful."""
    found = []
    for item in scene.objects:
        if item is other:
            continue
        verdict = sideways(item, other, side)
        if verdict is None:
            return None
        if verdict:
            found.append(item)
    return found


def what_side(scene: Scene, rng: Rng) -> Question | None:
    """What is on one side of an object."""
    if len(scene.objects) < 2 and rng.random() < 0.7:
        return None
    return _what_side(scene, rng, None)


def follow_up(scene: Scene, rng: Rng, previous: Question) -> Question | None:
    """What is beside the object of the turn before: "And what is left of it?"."""
    return None if previous.about is None else _what_side(scene, rng, previous.about)


def _what_side(scene: Scene, rng: Rng, it: Object | None) -> Question | None:
    """At most two objects are listed, and "nothing" is kept from being the answer too often."""
    if not scene.objects:
        return None
    other = it or pick(rng, scene.objects)
    side = pick(rng, list(phrases.SIDES))
    found = beside(scene, other, side)
    name = "it" if it is not None else reference(scene, other, rng)
    if found is None or name is None or len(found) > 2 or (not found and rng.random() < 0.5):
        return None
    wordings = phrases.WHAT_SIDE if it is None else phrases.WHAT_SIDE_IT
    return Question(
        skill="relation",
        text=pick(rng, wordings).format(b=name, side=pick(rng, phrases.SIDES[side])),
        answer=joined([short_name(item) for item in found]) or "nothing",
        about=found[0] if found else None,
        needs_previous=it is not None,
    )


def exists(scene: Scene, rng: Rng) -> Question | None:
    """Whether something is there; half the answers are yes.

    Half of the others name a colour and a shape that are both there, but not on one object.
    """
    wanted = bool(rng.random() < 0.5)
    kind = pick(rng, ("shape", "colour", "both", "both"))
    shown = _shown(scene)
    options = [
        (one, other)
        for one in (COLOURS if kind != "shape" else (None,))
        for other in (SHAPES if kind != "colour" else (None,))
        if ((one, other) in shown) is wanted
    ]
    near = [(one, other) for one, other in options if {(one, None), (None, other)} <= shown]
    if near and rng.random() < 0.5:
        options = near
    if not options:
        return None
    one, other = pick(rng, options)
    thing = " ".join(word for word in (one, other or "object") if word)
    text = pick(rng, phrases.EXISTS).format(one=with_article(thing))
    return Question(skill="yes/no", text=text, answer="yes" if wanted else "no")


def has_attribute(scene: Scene, rng: Rng) -> Question | None:
    """Whether an object has a colour or a size, or whether anything is at a place."""
    if not scene.objects:
        return None
    wanted = bool(rng.random() < 0.5)
    item = pick(rng, scene.objects)
    answer = "yes" if wanted else "no"
    kind = pick(rng, ("colour", "size", "place"))
    if kind == "place":
        taken = {one.cell for one in scene.objects}
        cells = [c for c in range(9) if (c in taken) is wanted and is_plain(scene, c)]
        if not cells:
            return None
        cell = pick(rng, cells)
        text = pick(rng, phrases.ANY_AT).format(place=at_place(PLACES[cell]))
        return Question(skill="yes/no", text=text, answer=answer)
    name = reference(scene, item, rng, hide=kind)
    if name is None:
        return None
    values: Sequence[str] = COLOURS if kind == "colour" else SIZES
    truth = getattr(item, kind)
    said = truth if wanted else pick(rng, [value for value in values if value != truth])
    wordings = phrases.HAS_COLOUR if kind == "colour" else phrases.HAS_SIZE
    text = pick(rng, wordings).format(a=name, colour=said, size=said)
    return Question(skill="yes/no", text=text, answer=answer, about=item)


def absent(scene: Scene, rng: Rng) -> Question | None:
    """A question about something that is not there: "there is no red star"."""
    if rng.random() < 0.15:
        return _absent_mark(scene, rng)
    kind = pick(rng, ("shape", "both", "both"))
    shown = _shown(scene)
    options = [
        (one, other)
        for one in (COLOURS if kind == "both" else (None,))
        for other in SHAPES
        if (one, other) not in shown
    ]
    near = [pair for pair in options if pair[0] and (pair[0], None) in shown]
    near = [pair for pair in near if (None, pair[1]) in shown] or near
    if near and rng.random() < 0.5:
        options = near
    one, other = pick(rng, options)
    thing = f"{one} {other}" if one else other
    asks = [phrases.PLACE, phrases.SIZE] + ([] if one else [phrases.COLOUR, phrases.COLOUR])
    text = pick(rng, pick(rng, asks)).format(a=f"the {thing}")
    if rng.random() < 0.2:
        side = pick(rng, phrases.SIDES[pick(rng, list(phrases.SIDES))])
        text = pick(rng, phrases.WHAT_SIDE).format(b=f"the {thing}", side=side)
    return Question(skill="absence", text=text, answer=f"there is no {thing}")


def _absent_mark(scene: Scene, rng: Rng) -> Question | None:
    if not scene.objects:
        return None
    if rng.random() < 0.5:
        wordings, answer = ("Which digit is this?", "What is the digit?"), "there is no digit"
    else:
        wordings, answer = ("What does the text say?", "Read the text."), "there is no text"
    return Question(skill="absence", text=pick(rng, wordings), answer=answer)


def read(scene: Scene, rng: Rng) -> Question | None:
    """What a word, a number or a digit says."""
    if scene.digit is not None:
        return Question(skill="digit", text=pick(rng, phrases.DIGIT), answer=str(scene.digit.value))
    if scene.writing is None:
        return None
    more = phrases.READ_NUMBER if scene.writing.is_number else phrases.READ_WORD
    return Question(skill="reading", text=pick(rng, phrases.READ + more), answer=scene.writing.text)


Maker = Callable[[Scene, Rng], Question | None]
# Makers with how often they are drawn; a maker that does not fit the scene gives way to another.
MAKERS: Final[tuple[tuple[Maker, float], ...]] = (
    (count, 1.3),
    (colour, 1.0),
    (shape, 1.0),
    (size, 0.8),
    (place, 1.6),
    (is_side, 1.0),
    (what_side, 1.3),
    (exists, 0.9),
    (has_attribute, 0.9),
    (absent, 0.9),
    (list_objects, 0.7),
    (describe, 0.7),
)
MARK_MAKERS: Final[tuple[tuple[Maker, float], ...]] = (
    (read, 3.0),
    (colour, 1.0),
    (count, 0.3),
    (exists, 0.4),
    (absent, 0.4),
    (list_objects, 0.8),
    (describe, 0.8),
)
SKILLS: Final = (
    "describe",
    "list",
    "count",
    "colour",
    "shape",
    "size",
    "place",
    "relation",
    "yes/no",
    "absence",
    "reading",
    "digit",
)
