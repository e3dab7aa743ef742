"""Questions about objects beside each other: left of, right of, above, below.

Nothing is asked about two objects that are neither level nor clearly beside each other.
"""

from pebble import phrases
from pebble.caption import joined, short_name
from pebble.reference import Question, Rng, pick, reference
from pebble.scene import CLEAR_MARGIN, LEVEL_MARGIN, Object, Scene


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
        names=((first, (item,)), (second, (other,))),
        side=words,
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
    """Return what is on one side of an object."""
    if len(scene.objects) < 2 and rng.random() < 0.7:
        return None
    return _what_side(scene, rng, None)


def follow_up(scene: Scene, rng: Rng, previous: Question) -> Question | None:
    """Return what is beside the object of the turn before: "And what is left of it?"."""
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
    words = pick(rng, phrases.SIDES[side])
    return Question(
        skill="relation",
        text=pick(rng, wordings).format(b=name, side=words),
        answer=joined([short_name(item) for item in found]) or "nothing",
        about=found[0] if found else None,
        needs_previous=it is not None,
        names=((name, (other,)),),
        says=tuple((short_name(item), (item,)) for item in found),
        side=words,
    )
