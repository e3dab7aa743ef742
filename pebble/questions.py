"""Questions about a scene with exact answers, skill by skill; knows no pixels.

Every function draws one question from a generator and returns None where the scene does not allow
one without doubt: a reference that fits two objects, or two objects that are neither level nor
clearly beside each other.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from pebble import phrases
from pebble.caption import (
    TOO_SMALL,
    at_place,
    caption,
    full_name,
    listing,
    short_name,
    with_article,
)
from pebble.glyphs import glyphs
from pebble.palette import COLOURS
from pebble.reference import (
    Pointer,
    Question,
    Rng,
    is_plain,
    matching,
    pick,
    reference,
    shown,
)
from pebble.relations import is_side, what_side
from pebble.scene import PLACES, SHAPES, SIZES, Scene


def describe(scene: Scene, rng: Rng) -> Question | None:
    """Return the complete description."""
    first = scene.objects[0] if scene.objects else None
    return Question(
        skill="describe",
        text=pick(rng, phrases.DESCRIBE),
        answer=caption(scene),
        about=first,
        says=_marks(scene) or tuple((full_name(item), (item,)) for item in scene.objects),
    )


def list_objects(scene: Scene, rng: Rng) -> Question | None:
    """Return what is in the picture, briefly."""
    first = scene.objects[0] if scene.objects else None
    return Question(
        skill="list",
        text=pick(rng, phrases.LIST),
        answer=listing(scene),
        about=first,
        says=_marks(scene) or tuple((short_name(item), (item,)) for item in scene.objects),
    )


def _marks(scene: Scene) -> tuple[Pointer, ...]:
    """Return what a scene without objects says: every digit alone, a word whole."""
    marks = glyphs(scene)
    if scene.digit is not None:
        return ((str(scene.digit.value), tuple(marks)),)
    if scene.writing is not None and scene.writing.is_small:
        return ((TOO_SMALL, tuple(marks)),)
    if scene.writing is not None and scene.writing.is_number:
        return tuple((glyph.text, (glyph,)) for glyph in marks)
    return () if scene.writing is None else ((scene.writing.text, tuple(marks)),)


def count(scene: Scene, rng: Rng) -> Question | None:
    """How many objects of a kind; 0 is an answer too, and every number is about equally likely."""
    if rng.random() < 0.4 or not scene.objects:
        return Question(
            skill="count", text=pick(rng, phrases.COUNT_ALL), answer=str(len(scene.objects))
        )
    by_number: dict[int, list[Pointer]] = {}
    kinds = [(colour, None) for colour in COLOURS] + [(None, shape) for shape in SHAPES]
    for colour, shape in kinds:
        found = matching(scene, colour=colour, shape=shape)
        by_number.setdefault(len(found), []).append((_plural(rng, None, colour, shape), (*found,)))
    for size in SIZES:
        found = matching(scene, size=size)
        by_number.setdefault(len(found), []).append((_plural(rng, size, None, None), (*found,)))
    for item in scene.objects:
        found = matching(scene, colour=item.colour, shape=item.shape)
        name = _plural(rng, None, item.colour, item.shape)
        by_number.setdefault(len(found), []).append((name, (*found,)))
    weights = np.array([1.0 + number for number in by_number])
    number = list(by_number)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    things, counted = pick(rng, by_number[number])
    return Question(
        skill="count",
        text=pick(rng, phrases.COUNT).format(things=things),
        answer=str(number),
        names=((things, counted),),
    )


def _plural(rng: Rng, size: str | None, colour: str | None, shape: str | None) -> str:
    noun = _plural_noun(shape) if shape else pick(rng, ("objects", "things", "shapes"))
    return " ".join(word for word in (size, colour, noun) if word)


def _plural_noun(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _about_one(
    scene: Scene, rng: Rng, skill: str, hide: str, wordings: Sequence[str]
) -> Question | None:
    """Return a question after one attribute of one object, all objects equally likely."""
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
    return Question(
        skill=skill,
        text=pick(rng, wordings).format(a=name),
        answer=answer,
        about=item,
        names=((name, (item,)),),
        says=((answer, (item,)),),
    )


def colour(scene: Scene, rng: Rng) -> Question | None:
    """Return the colour of an object, a word, a number or a digit."""
    mark = scene.writing or scene.digit
    if mark is not None:
        name = mark_name(scene)
        text = pick(rng, phrases.COLOUR).format(a=pick(rng, (name, name, "it")))
        return Question(skill="colour", text=text, answer=mark.colour)
    return _about_one(scene, rng, "colour", "colour", phrases.COLOUR)


def mark_name(scene: Scene) -> str:
    """Return what a scene without objects shows: "the word", "the number" or "the digit"."""
    if scene.writing is None:
        return "the digit"
    return "the number" if scene.writing.is_number else "the word"


def shape(scene: Scene, rng: Rng) -> Question | None:
    """Return the shape of an object."""
    return _about_one(scene, rng, "shape", "shape", phrases.SHAPE)


def size(scene: Scene, rng: Rng) -> Question | None:
    """Whether an object is small or large."""
    return _about_one(scene, rng, "size", "size", phrases.SIZE)


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
    where, what = at_place(PLACES[cell]), "nothing" if found is None else short_name(found)
    return Question(
        skill="place",
        text=pick(rng, phrases.WHAT_AT).format(place=where),
        answer=what,
        about=found,
        names=((where, () if found is None else (found,)),),
        says=() if found is None else ((what, (found,)),),
    )


def exists(scene: Scene, rng: Rng) -> Question | None:
    """Whether something is there; half the answers are yes.

    Half of the others name a colour and a shape that are both there, but not on one object.
    """
    wanted = bool(rng.random() < 0.5)
    kind = pick(rng, ("shape", "colour", "both", "both"))
    there = shown(scene)
    options = [
        (one, other)
        for one in (COLOURS if kind != "shape" else (None,))
        for other in (SHAPES if kind != "colour" else (None,))
        if ((one, other) in there) is wanted
    ]
    near = [(one, other) for one, other in options if {(one, None), (None, other)} <= there]
    if near and rng.random() < 0.5:
        options = near
    if not options:
        return None
    one, other = pick(rng, options)
    thing = " ".join(word for word in (one, other or "object") if word)
    text = pick(rng, phrases.EXISTS).format(one=with_article(thing))
    found = tuple(matching(scene, colour=one, shape=other))
    return Question(
        skill="yes/no",
        text=text,
        answer="yes" if wanted else "no",
        names=((thing, found),),
    )


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
        where = at_place(PLACES[cell])
        text = pick(rng, phrases.ANY_AT).format(place=where)
        found = tuple(one for one in scene.objects if one.cell == cell)
        return Question(skill="yes/no", text=text, answer=answer, names=((where, found),))
    name = reference(scene, item, rng, hide=kind)
    if name is None:
        return None
    values: Sequence[str] = COLOURS if kind == "colour" else SIZES
    truth = getattr(item, kind)
    said = truth if wanted else pick(rng, [value for value in values if value != truth])
    wordings = phrases.HAS_COLOUR if kind == "colour" else phrases.HAS_SIZE
    text = pick(rng, wordings).format(a=name, colour=said, size=said)
    return Question(skill="yes/no", text=text, answer=answer, about=item, names=((name, (item,)),))


def absent(scene: Scene, rng: Rng) -> Question | None:
    """Return a question about something that is not there: "there is no red star"."""
    if rng.random() < 0.15:
        return _absent_mark(scene, rng)
    kind = pick(rng, ("shape", "both", "both"))
    there = shown(scene)
    options = [
        (one, other)
        for one in (COLOURS if kind == "both" else (None,))
        for other in SHAPES
        if (one, other) not in there
    ]
    near = [pair for pair in options if pair[0] and (pair[0], None) in there]
    near = [pair for pair in near if (None, pair[1]) in there] or near
    if near and rng.random() < 0.5:
        options = near
    if not options:  # a crowd may hold every shape
        return None
    one, other = pick(rng, options)
    thing = f"{one} {other}" if one else other
    asks = [phrases.PLACE, phrases.SIZE] + ([] if one else [phrases.COLOUR, phrases.COLOUR])
    text = pick(rng, pick(rng, asks)).format(a=f"the {thing}")
    if rng.random() < 0.2:
        side = pick(rng, phrases.SIDES[pick(rng, list(phrases.SIDES))])
        text = pick(rng, phrases.WHAT_SIDE).format(b=f"the {thing}", side=side)
    return Question(skill="absence", text=text, answer=f"there is no {thing}", names=((thing, ()),))


def _absent_mark(scene: Scene, rng: Rng) -> Question | None:
    if not scene.objects:
        return None
    if rng.random() < 0.5:
        wordings, answer = ("Which digit is this?", "What is the digit?"), "there is no digit"
    else:
        wordings, answer = ("What does the text say?", "Read the text."), "there is no text"
    return Question(skill="absence", text=pick(rng, wordings), answer=answer)


def read(scene: Scene, rng: Rng) -> Question | None:
    """Return what a word, a number or a digit says."""
    if scene.digit is not None:
        answer = str(scene.digit.value)
        text = pick(rng, phrases.DIGIT)
        return Question(skill="digit", text=text, answer=answer, says=_marks(scene))
    if scene.writing is None:
        return None
    more = phrases.READ_NUMBER if scene.writing.is_number else phrases.READ_WORD
    text = pick(rng, phrases.READ + more)
    answer = TOO_SMALL if scene.writing.is_small else scene.writing.text
    return Question(skill="reading", text=text, answer=answer, says=_marks(scene))


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
