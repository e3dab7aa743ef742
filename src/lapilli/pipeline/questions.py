"""Questions to decide about one input, and their answers: predicates, choices and scores.

The names are those of OpenAI's Decisions API. Knows texts and numbers; must not know prompts,
tokens or models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from lapilli.config.reader import shown
from lapilli.errors import PromptError

MAX_CHOICES = 255

Instructions = str | tuple[object, ...]
"""A text, or texts and pictures in order."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """A question that is answered with yes or no, or a statement that is true or not.

    Attributes:
        instructions: the question: a text, or a tuple of texts and pictures.
        name: comes back with the answer.

    Raises:
        PromptError: a question with nothing in it.
    """

    instructions: Instructions
    name: str | None = None

    def __post_init__(self) -> None:
        _check_instructions(self.instructions)


@dataclass(frozen=True, slots=True)
class Option:
    """What may be chosen: a text or a truth value, and what is meant by it."""

    value: str | bool
    description: str = ""

    @property
    def text(self) -> str:
        """Return the value as it is written into the prompt."""
        return str(self.value).lower() if isinstance(self.value, bool) else self.value


@dataclass(frozen=True, slots=True)
class Choice:
    """A question that is answered with one of several options.

    Attributes:
        instructions: as those of a Predicate.
        choices: 2 to 255 different ones: texts, truth values, or Options with a description.
        spelled: False lists the options in the prompt, each behind a letter or a number, and reads
            the probabilities of those. True leaves the question as it is and reads the
            probabilities of the options themselves as the answer, for models that were trained to
            answer in a word.
        name: comes back with the answer.

    Raises:
        PromptError: a question with nothing in it, fewer or more options, two that are equal, or
            an empty one.
    """

    instructions: Instructions
    choices: Sequence[str | bool | Option]
    spelled: bool = field(default=False, kw_only=True)
    name: str | None = None

    def __post_init__(self) -> None:
        _check_instructions(self.instructions)
        given = _several(self.choices, "choices", MAX_CHOICES)
        for one in given:
            is_one = isinstance(one, str | bool | Option)
            value = one.value if isinstance(one, Option) else one
            if not is_one or not isinstance(value, str | bool) or value in ("", " "):
                raise PromptError(
                    f"a choice must be a text, True, False or an Option, got {shown(one)}"
                )
        values = [(type(one.value), one.value) for one in self.options]
        twice = next((one for one in values if values.count(one) > 1), None)
        if twice is not None:
            raise PromptError(f"the choice {twice[1]!r} comes twice: choices must differ")

    @property
    def options(self) -> tuple[Option, ...]:
        """Return the choices, each as an Option."""
        return tuple(one if isinstance(one, Option) else Option(one) for one in self.choices)


@dataclass(frozen=True, slots=True)
class Level:
    """A step of a scale: its label, and what is meant by it."""

    label: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A question that is answered with a place on a scale.

    Attributes:
        instructions: as those of a Predicate.
        levels: 2 to 255 steps from the lowest to the highest. Whole numbers from 0 on, such as
            range(1, 6), are worth what they are; texts and Levels are worth 0, 1, 2 and so on.
        name: comes back with the answer.

    Raises:
        PromptError: a question with nothing in it, fewer or more levels, two that are equal, a
            negative number, or numbers beside texts.
    """

    instructions: Instructions
    levels: Sequence[int | str | Level]
    name: str | None = None

    def __post_init__(self) -> None:
        _check_instructions(self.instructions)
        given = _several(self.levels, "levels", MAX_CHOICES)
        are_numbers = [type(one) is int and one >= 0 for one in given]
        if not all(are_numbers) and (
            any(are_numbers) or not all(isinstance(one, str | Level) for one in given)
        ):
            raise PromptError(
                "levels must be whole numbers from 0 on, or texts and Levels, got "
                f"{', '.join(map(shown, given[:8]))}"
            )
        labels = [label for label, _, _ in self.steps]
        twice = next((one for one in labels if labels.count(one) > 1), None)
        if twice is not None:
            raise PromptError(f"the level {twice!r} comes twice: levels must differ")
        if not all(label.strip() for label in labels):
            raise PromptError("a level has no label: give it a text")

    @property
    def steps(self) -> tuple[tuple[str, str, int], ...]:
        """Return label, description and value of every level."""
        found = []
        for at, level in enumerate(self.levels):
            if isinstance(level, Level):
                found.append((level.label, level.description, at))
            else:
                found.append((str(level), "", level if isinstance(level, int) else at))
        return tuple(found)


Question = Predicate | Choice | Score


@dataclass(frozen=True, slots=True)
class PredicateAnswer:
    """How likely the answer is yes."""

    probability: float
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ChoiceAnswer:
    """The most likely option, and the probability of every one in the order of the question."""

    choice: str | bool
    probabilities: tuple[float, ...]
    values: tuple[str | bool, ...] = field(repr=False)
    name: str | None = None

    @property
    def confidence(self) -> float:
        """Return the probability of the most likely option."""
        return max(self.probabilities)


@dataclass(frozen=True, slots=True)
class ScoreAnswer:
    """The expected value, and the probability of every level in the order of the question."""

    score: float
    probabilities: tuple[float, ...]
    labels: tuple[str, ...] = field(repr=False)
    values: tuple[int, ...] = field(repr=False)
    name: str | None = None

    @property
    def confidence(self) -> float:
        """Return the probability of the most likely level."""
        return max(self.probabilities)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A question that the model does not answer, and why."""

    reason: str
    name: str | None = None


Answer = PredicateAnswer | ChoiceAnswer | ScoreAnswer | Refusal


@dataclass(frozen=True, slots=True)
class Decisions(Sequence[Answer]):
    """The answers in the order of the questions, and what was read for them.

    Attributes:
        answers: one per question.
        prompt_tokens: positions that the prompts have: those that all share once, and those of
            every question.
        cached_tokens: how many of them were kept from an earlier call.
        shared_tokens: how many of them all questions share.
    """

    answers: tuple[Answer, ...]
    prompt_tokens: int
    cached_tokens: int
    shared_tokens: int

    def __len__(self) -> int:
        return len(self.answers)

    @overload
    def __getitem__(self, index: int) -> Answer: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Answer, ...]: ...

    def __getitem__(self, index: int | slice) -> Answer | tuple[Answer, ...]:
        return self.answers[index]

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.answers)


def answer_json(answer: Answer) -> dict[str, Any]:
    """Return one answer in the form of OpenAI's Decisions API."""
    if isinstance(answer, PredicateAnswer):
        return {"type": "predicate", "name": answer.name, "probability": answer.probability}
    if isinstance(answer, Refusal):
        return {"type": "refusal", "name": answer.name}
    if isinstance(answer, ChoiceAnswer):
        pairs = zip(answer.values, answer.probabilities, strict=True)
        return {
            "type": "choice",
            "name": answer.name,
            "choice": answer.choice,
            "confidence": answer.confidence,
            "probabilities": [{"value": value, "probability": share} for value, share in pairs],
        }
    steps = zip(answer.labels, answer.values, answer.probabilities, strict=True)
    return {
        "type": "score",
        "name": answer.name,
        "score": answer.score,
        "confidence": answer.confidence,
        "probabilities": [
            {"label": label, "value": value, "probability": share} for label, value, share in steps
        ],
    }


def _check_instructions(given: object) -> None:
    parts = given if isinstance(given, tuple | list) else (given,)
    is_right = isinstance(given, str | tuple)
    if not is_right or not any(not isinstance(part, str) or part.strip() for part in parts):
        raise PromptError(
            "the instructions of a question must be a text, or several texts and pictures, "
            f"with something in them, got {shown(given)}"
        )


def _several(given: object, name: str, most: int) -> Sequence[object]:
    """Return what was given as a list.

    Raises:
        PromptError: no list, or one of another length than 2 to `most`.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise PromptError(f"{name} must be a list, got {shown(given)}")
    if not 2 <= len(given) <= most:
        raise PromptError(f"{name} must be 2 to {most}, got {len(given)}")
    return given
