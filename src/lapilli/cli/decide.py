"""`lapilli decide IMAGE --question ...`: probabilities for many questions about one input.

    --question "Is it red?"                                        a predicate
    --questions FILE    a JSON list, or JSONL, of texts and of objects of OpenAI's Decisions API:
        {"type": "choice", "instructions": "What color?", "choices": ["red", "blue"]}

What is wrong with a question is said, with its place, before a model is loaded. A question that the
model does not answer is printed with the reason, and the others are answered.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.cli.ask import Images, read_pipe_once
from lapilli.cli.terminal import ModelOptions, StoreOfModality, open_stores
from lapilli.config.reader import shown, unique_keys
from lapilli.errors import PromptError

if TYPE_CHECKING:
    from lapilli.pipeline.questions import Answer, Question

Asked = Annotated[
    list[str] | None,
    typer.Option("--question", help="A question of yes and no, or a statement; repeatable."),
]
File = Annotated[
    Path | None,
    typer.Option("--questions", help="A JSON list, or JSONL: predicates, choices and scores."),
]
Text = Annotated[str | None, typer.Option(help="A text that the questions are about.")]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON object for each question.")]

KEYS: Mapping[str, frozenset[str]] = {
    "predicate": frozenset(("type", "name", "instructions")),
    "choice": frozenset(("type", "name", "instructions", "choices", "spelled")),
    "score": frozenset(("type", "name", "instructions", "levels")),
}
"""The keys of a question, by its type."""


def decide(
    images: Images = None,
    *,
    question: Asked = None,
    questions: File = None,
    text: Text = None,
    store: StoreOfModality = None,
    how: ModelOptions,
    as_json: Json = False,
) -> None:
    """Answer many questions about pictures or a text with probabilities; a line for each."""
    from lapilli.pipeline.questions import Predicate
    from lapilli.prompt.message import MediaPart

    asked: list[Question] = [Predicate(one) for one in question or []]
    if questions is not None:
        asked += read_questions(questions)
    if not asked:
        raise PromptError("no question: ask one with --question TEXT, or several in --questions")
    pictures = [MediaPart(one) for one in read_pipe_once(images or [])]
    given = [*pictures, *([] if text is None else [text])]
    if not given:
        raise PromptError("nothing to decide about: name a picture, or a text with --text")
    chat = how.of_chat().load(open_stores(store or []))
    for one, answer in zip(asked, chat.decide(given, asked), strict=True):
        line = json.dumps(_row(one, answer), ensure_ascii=False) if as_json else _line(one, answer)
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def read_questions(path: Path) -> "list[Question]":
    """Return the questions of a file: a JSON list, or a text or an object on each line.

    Raises:
        PromptError: no UTF-8, no JSON, no question in it, or one that cannot be asked.
        OSError: it cannot be read.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 at byte {error.start + 1}") from error
    found = []
    for where, one in _rows(content, str(path)):
        try:
            found.append(question_of(one))
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from error
    if not found:
        raise PromptError(f"{path} has no question: expected a JSON list, or one on each line")
    return found


def _rows(content: str, path: str) -> Iterator[tuple[str, object]]:
    """Yield the JSON value of every question, with its place in the file."""
    if content.lstrip().startswith("["):
        for number, one in enumerate(_parsed(content, path), 1):
            yield f"{path}: question {number}", one
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Any:  # noqa: ANN401  whatever JSON holds
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise PromptError(f"{where}: lists or objects too deep") from error
    except ValueError as error:
        raise PromptError(f"{where}: not JSON: {error}") from error


def question_of(given: object) -> "Question":
    """Return the question that JSON asks: a text is a predicate, an object names its type.

    Raises:
        PromptError: an unknown type or key, a key that is missing, or a question that cannot be
            asked.
    """
    from lapilli.pipeline.questions import Choice, Predicate, Score

    if isinstance(given, str):
        return Predicate(given)
    kind = given.get("type", "predicate") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(kind, str) or kind not in KEYS:
        raise PromptError(
            "a question must be a text, or an object whose type is predicate, choice or score, "
            f"got {shown(given)}"
        )
    unknown = sorted(given.keys() - KEYS[kind])
    if unknown:
        known = ", ".join(sorted(KEYS[kind]))
        raise PromptError(f"unknown key {shown(unknown[0])} of a {kind}: expected {known}")
    missing = sorted(KEYS[kind] - given.keys() - {"type", "name", "spelled"})
    if missing:
        raise PromptError(f"a {kind} needs {' and '.join(missing)}")
    instructions, name = given["instructions"], given.get("name")
    if not isinstance(instructions, str) or not isinstance(name, str | None):
        raise PromptError("instructions and name of a question must be texts")
    if kind == "predicate":
        return Predicate(instructions, name)
    if kind == "score":
        return Score(instructions, _several(given, "levels", "label"), name)
    spelled = given.get("spelled", False)
    if not isinstance(spelled, bool):
        raise PromptError(f"spelled must be true or false, got {shown(spelled)}")
    return Choice(instructions, _several(given, "choices", "value"), name, spelled=spelled)


def _several(row: dict[str, Any], name: str, key: str) -> list[Any]:
    """Return choices or levels; objects of OpenAI's form as an Option or a Level.

    Raises:
        PromptError: no list, or an object of another form.
    """
    from lapilli.pipeline.questions import Level, Option

    kind, plain = (Option, {str, bool}) if key == "value" else (Level, {str, int})
    inside = {str, bool} if key == "value" else {str}
    given = row[name]
    if not isinstance(given, list):
        raise PromptError(f"{name} must be a list, got {shown(given)}")
    for one in given:
        if isinstance(one, dict):
            described = isinstance(one.get("description", ""), str)
            is_right = described and type(one.get(key)) in inside
            is_right = is_right and one.keys() <= {key, "description"}
        else:
            is_right = type(one) in plain
        if not is_right:
            kinds = "texts, true and false" if key == "value" else "texts or whole numbers"
            raise PromptError(
                f"{name} are {kinds}, or objects with {key} and a description, got {shown(one)}"
            )
    return [kind(**one) if isinstance(one, dict) else one for one in given]


def _row(question: "Question", answer: "Answer") -> dict[str, Any]:
    """Return what --json prints of an answer: OpenAI's form with the question before it."""
    from lapilli.pipeline.questions import Refusal, answer_json

    row = {"question": question.instructions, **answer_json(answer)}
    return row | {"reason": answer.reason} if isinstance(answer, Refusal) else row


def _line(question: "Question", answer: "Answer") -> str:
    """Return an answer as a line for people: what was asked, the answer, all probabilities."""
    from lapilli.pipeline.questions import ChoiceAnswer, PredicateAnswer, Refusal

    asked = " ".join((question.name or str(question.instructions)).split())
    if isinstance(answer, Refusal):
        return f"{asked}\trefused: {answer.reason}"
    if isinstance(answer, PredicateAnswer):
        said = "yes" if answer.probability >= 0.5 else "no"
        return f"{asked}\t{said}\tyes {answer.probability:.3f}"
    if isinstance(answer, ChoiceAnswer):
        texts, said = [_shown(one) for one in answer.values], _shown(answer.choice)
    else:
        texts, said = [_shown(one) for one in answer.labels], f"{answer.score:.2f}"
    shares = zip(texts, answer.probabilities, strict=True)
    return f"{asked}\t{said}\t{', '.join(f'{text} {share:.3f}' for text, share in shares)}"


def _shown(value: str | bool) -> str:
    """Return a choice as it stands in the prompt, in one line."""
    return " ".join((str(value).lower() if isinstance(value, bool) else value).split())
