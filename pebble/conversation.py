r"""Turns of a conversation about one scene, in LLaVA's JSON layout; knows questions, no pixels.

{"id": "42", "image": "42", "skills": ["count", ...], "conversations": [
    {"from": "human", "value": "<image>\nHow many objects are there?"},
    {"from": "gpt", "value": "3"}, ...]}
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from pebble.caption import caption
from pebble.questions import MAKERS, MARK_MAKERS, describe, list_objects
from pebble.reference import Question
from pebble.relations import follow_up
from pebble.scene import Scene

_FOLLOW_UP: Final = 0.15
_LONG_FIRST: Final = 0.25  # conversations that start with a description, as people's often do
_ATTEMPTS: Final = 60
Sample = dict[str, Any]


def draw_questions(
    scene: Scene, rng: np.random.Generator, *, least: int = 6, most: int = 10
) -> list[Question]:
    """Different questions about one scene, short answers first.

    Args:
        scene: what is asked about.
        rng: chooses the questions and their wordings.
        least: fewest turns; a scene that allows fewer different questions gives fewer.
        most: most turns.
    """
    makers = MAKERS if scene.objects else MARK_MAKERS
    weights = np.array([weight for _, weight in makers])
    wanted = int(rng.integers(least, most + 1)) if scene.objects else min(least, 4)
    order = rng.choice(len(makers), size=_ATTEMPTS, p=weights / weights.sum())
    asked: dict[str, Question] = {}
    for i in order:
        if len(asked) == wanted:
            break
        question = makers[int(i)][0](scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    turns = _one_long_each(list(asked.values()))
    turns.sort(key=lambda question: len(question.answer) > 24)
    if scene.objects and rng.random() < _LONG_FIRST:
        opening = (describe if rng.random() < 0.5 else list_objects)(scene, rng)
        turns = [turn for turn in turns if turn.skill not in ("describe", "list")]
        turns = [opening, *turns][:most] if opening is not None else turns
    return _with_follow_ups(scene, turns, rng)


def _one_long_each(turns: list[Question]) -> list[Question]:
    """At most one description and one list: the second could be copied from the first."""
    kept: list[Question] = []
    for turn in turns:
        if turn.skill in ("describe", "list") and any(turn.skill == k.skill for k in kept):
            continue
        kept.append(turn)
    return kept


def _with_follow_ups(
    scene: Scene, turns: list[Question], rng: np.random.Generator
) -> list[Question]:
    result: list[Question] = []
    for turn in turns:
        result.append(turn)
        if turn.about is not None and rng.random() < _FOLLOW_UP:
            extra = follow_up(scene, rng, turn)
            result += [extra] if extra is not None else []
    return result


def conversation(
    scene: Scene, rng: np.random.Generator, *, least: int = 6, most: int = 10
) -> Sample:
    """One multi-turn sample with the picture in its first turn."""
    turns = draw_questions(scene, rng, least=least, most=most)
    return as_sample(str(scene.seed), turns, opening="<image>\n", image=str(scene.seed))


def caption_sample(scene: Scene) -> Sample:
    """Picture and caption without a question, for the tower and for stage 1 (as in LLaVA)."""
    name = str(scene.seed)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption(scene)}]
    return {"id": name, "image": name, "conversations": turns, "skills": ["describe"]}


def text_sample(
    scene: Scene, rng: np.random.Generator, *, least: int = 6, most: int = 10
) -> Sample:
    """Return the same questions with the caption in the place of the picture.

    A language model learns from these what counting and comparing places mean before it sees a
    picture.
    """
    turns = draw_questions(scene, rng, least=least, most=most)
    return as_sample(str(scene.seed), turns, opening=f"{caption(scene)}\n", image=None)


def as_sample(
    name: str, turns: Sequence[Question], *, opening: str, image: str | None, first: int = 0
) -> Sample:
    """Return turns in LLaVA's layout; `opening` stands before the question of turn `first`."""
    values: list[dict[str, str]] = []
    for i, turn in enumerate(turns):
        text = opening + turn.text if i == first else turn.text
        values += [{"from": "human", "value": text}, {"from": "gpt", "value": turn.answer}]
    sample: Sample = {"id": name, "conversations": values, "skills": [t.skill for t in turns]}
    if image is not None:
        sample["image"] = image
    return sample
