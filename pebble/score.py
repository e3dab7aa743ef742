"""How often an answer is exactly right, per skill; a model is a function from questions to answers.

Scenes of the exam have seeds that no pool uses, and its digits come from the held-out fifth.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from lapilli.errors import ConfigError
from pebble.blind import exam_questions, needs_picture
from pebble.conversation import draw_questions
from pebble.digits import digit_split
from pebble.glyphs import BITMAP_FONT
from pebble.questions import SKILLS, read
from pebble.reference import Question
from pebble.sample import sample_scene
from pebble.scene import Scene
from pebble.typed import typed_scene

EXAM_SEED: Final = 1_000_000_000  # pools stay below
NUM_QUESTIONS: Final = 2000
WIDER: Final = {
    "numbers in Pillow's default font": 200,
    "words in Pillow's default font": 200,
    "words and numbers in other fonts": 200,
    "type too small to read": 100,
    "asked without a picture": 100,
}
"""What the exam of the wider world asks, and how often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamItem:
    """A question to answer; only a follow-up has a history of (question, answer) before it.

    A question that is asked without a picture has no scene.
    """

    scene: Scene | None
    history: tuple[tuple[str, str], ...]
    question: str
    answer: str
    skill: str


Answerer = Callable[[Sequence[ExamItem]], Sequence[str]]


def exam(num_questions: int = NUM_QUESTIONS, *, first_seed: int = EXAM_SEED) -> list[ExamItem]:
    """Questions on fresh scenes, one scene each, every skill but the digit about equally often.

    Digit questions are drawn from the held-out scans.
    """
    per_skill = -(-num_questions // len(SKILLS))
    left = Counter(dict.fromkeys(SKILLS, per_skill))
    items: list[ExamItem] = []
    held_out = digit_split()[1]
    seed = first_seed
    while len(items) < num_questions:
        wanted = {skill for skill, number in left.items() if number > 0}
        scene = _scene_for(seed, wanted, held_out)
        item = _item(scene, wanted)
        if item is not None:
            items.append(item)
            left[item.skill] -= 1
        seed += 1
    return items


def _scene_for(seed: int, wanted: set[str], held_out: Sequence[int]) -> Scene:
    if wanted <= {"digit"} or ("digit" in wanted and seed % 12 == 0):
        return sample_scene(seed, digit_index=held_out[seed % len(held_out)])
    if wanted <= {"reading"} or ("reading" in wanted and seed % 12 == 1):
        return sample_scene(seed, "writing")
    scene = sample_scene(seed)
    return sample_scene(seed, "objects") if scene.digit is not None else scene


def _item(scene: Scene, wanted: set[str]) -> ExamItem | None:
    rng = np.random.default_rng([scene.seed, 19])
    turns = draw_questions(scene, rng)
    chosen = [i for i, turn in enumerate(turns) if turn.skill in wanted]
    if not chosen:
        return None
    i = chosen[int(rng.integers(len(chosen)))]
    before = turns[i - 1 : i] if turns[i].needs_previous else []
    return _as_item(scene, before, turns[i])


def _as_item(scene: Scene, before: Sequence[Question], turn: Question) -> ExamItem:
    return ExamItem(
        scene=scene,
        history=tuple((one.text, one.answer) for one in before),
        question=turn.text,
        answer=turn.answer,
        skill=turn.skill,
    )


def held_out_digits(*, first_seed: int = EXAM_SEED + 500_000_000) -> list[ExamItem]:
    """One question for every held-out handwritten digit."""
    items = []
    for i, index in enumerate(digit_split()[1]):
        scene = sample_scene(first_seed + i, digit_index=index)
        if scene.digit is None:
            raise ConfigError(f"scene {scene.seed} should show digit scan {index} and shows none")
        question = Question(
            skill="digit", text="Which digit is this?", answer=str(scene.digit.value)
        )
        items.append(_as_item(scene, (), question))
    return items


def wider_exam(*, first_seed: int = EXAM_SEED + 700_000_000) -> list[ExamItem]:
    """Type of any size, and questions without a picture: as many as `WIDER` says."""
    left = dict(WIDER)
    asked = left.pop("asked without a picture")
    items = []
    for text in exam_questions(first_seed, asked):
        answer = needs_picture(text).answer
        items.append(
            ExamItem(
                scene=None,
                history=(),
                question=text,
                answer=answer,
                skill="asked without a picture",
            )
        )
    seed = first_seed
    while any(left.values()):
        scene = typed_scene(seed)
        seed += 1
        skill = _wider_skill(scene)
        if not left[skill]:
            continue
        left[skill] -= 1
        turn = read(scene, np.random.default_rng([scene.seed, 53]))
        if turn is None:
            raise ConfigError(f"scene {scene.seed} should show type and shows none")
        items.append(replace(_as_item(scene, (), turn), skill=skill))
    return items


def _wider_skill(scene: Scene) -> str:
    writing = scene.writing
    if writing is None:
        raise ConfigError(f"scene {scene.seed} should show type and shows none")
    if writing.is_small:
        return "type too small to read"
    if writing.font not in (0, BITMAP_FONT):
        return "words and numbers in other fonts"
    return f"{'numbers' if writing.is_number else 'words'} in Pillow's default font"


def normalised(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return re.sub(r"\s+", " ", answer).strip().lower().removesuffix(".").rstrip()


def is_exact(answer: str, truth: str) -> bool:
    """Whether the answer is the expected one, case, spaces and a final full stop aside."""
    return normalised(answer) == normalised(truth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Right answers among all."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.total if self.total else 0.0


def score(
    answerer: Answerer, items: Sequence[ExamItem], *, batch_size: int = 32
) -> dict[str, Tally]:
    """Right answers per skill, and "all".

    Raises:
        ConfigError: the model gave another number of answers than questions.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        answers = answerer(batch)
        if len(answers) != len(batch):
            raise ConfigError(
                f"{len(batch)} questions but {len(answers)} answers; one each is needed"
            )
        for item, answer in zip(batch, answers, strict=True):
            for name in (item.skill, "all"):
                total[name] += 1
                right[name] += is_exact(answer, item.answer)
    names = [skill for skill in (*SKILLS, *WIDER, "all") if total[skill]]
    return {name: Tally(right=right[name], total=total[name]) for name in names}
