"""Wording: what is written around a question, and what its options are called.

Wording, Question --question_parts--> texts and media of the question, in order
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lapilli.config.reader import shown
from lapilli.errors import PromptError
from lapilli.pipeline.questions import Choice, Instructions, Question, Score
from lapilli.prompt.message import MediaPart, Part, TextPart

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION, OPTIONS = "{question}", "{options}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """What is written around a question.

    Attributes:
        predicate: of a question with a question mark at its end, with {question} in it.
        statement: of a predicate without one, with {question} in it.
        choice: with {question} and {options}, a line for each option.
        score: with {question} and {options}, a line for each level.

    Raises:
        PromptError: a text without its places.
    """

    predicate: str = QUESTION
    statement: str = f"{QUESTION}\nIs this true? Answer yes or no."
    choice: str = f"{QUESTION}\n{OPTIONS}\nAnswer with the letter or number of the best option."
    score: str = f"{QUESTION}\n{OPTIONS}\nAnswer with the number of the right level."

    def __post_init__(self) -> None:
        for field in fields(self):
            text = getattr(self, field.name)
            needed = [QUESTION, OPTIONS] if field.name in ("choice", "score") else [QUESTION]
            if not isinstance(text, str) or any(text.count(place) != 1 for place in needed):
                raise PromptError(
                    f"the wording of a {field.name} has {' and '.join(needed)} once, got "
                    f"{shown(text)}"
                )

    def of(self, question: Question) -> str:
        """Return the text around this question."""
        if isinstance(question, Choice):
            return QUESTION if question.spelled else self.choice
        if isinstance(question, Score):
            return self.score
        given = question.instructions
        last = given if isinstance(given, str) else given[-1]
        is_asked = isinstance(last, str) and last.rstrip().endswith(("?", "\uff1f"))
        return self.predicate if is_asked else self.statement


def question_parts(question: Question, wording: Wording) -> Iterator[str | MediaPart]:
    """Yield texts and media of a question, with what is written around it."""
    text, lines = wording.of(question), ""
    if isinstance(question, Choice):
        options = [(option.text, option.description) for option in question.options]
        lines = _lines(codes_of(question), options)
    elif isinstance(question, Score):
        lines = _lines(codes_of(question), [(label, said) for label, said, _ in question.steps])
    opening, _, closing = text.partition(QUESTION)
    given: Instructions = question.instructions
    found: list[str | MediaPart] = [opening.replace(OPTIONS, lines)]
    for one in (given,) if isinstance(given, str) else given:
        part = part_of(one)
        found.append(part.text if isinstance(part, TextPart) else part)
    found.append(closing.replace(OPTIONS, lines))
    yield from (part for part in found if part != "")


def _lines(codes: Sequence[str], options: Sequence[tuple[str, str]]) -> str:
    """Return a line for each option: its code, its text where that says more, what is meant."""
    found = []
    for code, (text, description) in zip(codes, options, strict=True):
        is_number = text.isdecimal() and int(text) == int(code) if code.isdecimal() else False
        said = code if is_number else f"{code}. {text}"
        found.append(f"{said}: {description}" if description else said)
    return "\n".join(found)


def codes_of(question: Choice | Score) -> list[str]:
    """Return what the options are called, all of one length: none begins another."""
    if isinstance(question, Choice) and len(question.choices) <= len(LETTERS):
        return list(LETTERS[: len(question.choices)])
    if isinstance(question, Choice):
        numbers = list(range(1, len(question.choices) + 1))
    else:
        numbers = [value for _, _, value in question.steps]
    width = len(str(max(numbers)))
    return [f"{number:0{width}d}" for number in numbers]


def part_of(given: object) -> Part:
    """Return a text, a path, a picture or a medium as a part of a message."""
    if isinstance(given, str):
        return TextPart(given)
    if isinstance(given, TextPart | MediaPart):
        return given
    return MediaPart(str(given) if isinstance(given, Path) else given)
