"""Phrases that mean one object and no other, and the question they end up in; knows no skill."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pebble.glyphs import Glyph
from pebble.scene import Object, Scene

T = TypeVar("T")
Rng = np.random.Generator
Pointer = tuple[str, tuple[Object | Glyph, ...]]
"""A phrase and everything that it means; nothing where it means what is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One turn.

    Attributes:
        skill: one of `SKILLS`.
        about: the object that "it" means in the next turn, or None where nothing was named.
        needs_previous: the question says "it" and means the object of the turn before.
        names: phrases of the question that mean objects of the scene, in their order.
        says: phrases of the answer and what they are read from, in their order.
        side: the words of the question that say on which side of an object.
    """

    skill: str
    text: str
    answer: str
    about: Object | None = None
    needs_previous: bool = False
    names: tuple[Pointer, ...] = ()
    says: tuple[Pointer, ...] = ()
    side: str = ""


def pick(rng: Rng, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def matching(
    scene: Scene, *, size: str | None = None, colour: str | None = None, shape: str | None = None
) -> list[Object]:
    """Return the objects that are all of this; None stands for any."""
    return [
        item
        for item in scene.objects
        if size in (None, item.size)
        and colour in (None, item.colour)
        and shape in (None, item.shape)
    ]


def shown(scene: Scene) -> set[tuple[str | None, str | None]]:
    """Colours, shapes and both together that some object has; None stands for any."""
    return {
        pair
        for item in scene.objects
        for pair in ((item.colour, item.shape), (item.colour, None), (None, item.shape))
    }


def reference(scene: Scene, item: Object, rng: Rng, *, hide: str = "") -> str | None:
    """Return a phrase that means this object and no other, or None.

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
        choice for choice in choices if hide not in choice and len(matching(scene, **choice)) == 1
    ]
    if not fits:
        return None
    return _definite(rng, fits[0] if rng.random() < 0.4 else pick(rng, fits))


def _definite(rng: Rng, choice: dict[str, str]) -> str:
    noun = choice.get("shape") or pick(rng, ("object", "thing", "shape"))
    words = ["the", choice.get("size", ""), choice.get("colour", ""), noun]
    return " ".join(word for word in words if word)


def is_plain(scene: Scene, cell: int) -> bool:
    """Whether a question may name this place.

    An object at the top left is also on the left, so "on the left" is doubtful while it is there.
    """
    taken = {item.cell for item in scene.objects}
    corners = {1: (0, 2), 3: (0, 6), 5: (2, 8), 7: (6, 8)}
    return not taken.intersection(corners.get(cell, ()))
