"""`lapilli batch IN.jsonl OUT.jsonl`: many questions, a line each; may be stopped and run again.

    in    {"question": "...", "images": ["a.png"], "id": 7}      paths beside the file, any id
    out   {"line": 1, "id": 7, "asked": "...", "answer": "...", ...} or {..., "error": "..."}

Every line ends as an answer or as its error, whatever it holds. The files are read and written in
batch_file.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapilli.cli.batch_file import AnswerFile, Line, Question, Result, read_lines
from lapilli.cli.terminal import PLACEHOLDER, STAYED_TEXT, ChatOptions, Sampling, counting, note
from lapilli.config.generation import SamplingParams
from lapilli.errors import LapilliError

if TYPE_CHECKING:
    from lapilli.generate.output import Generation
    from lapilli.pipeline import Chat
    from lapilli.prompt.message import Message

Source = Annotated[
    Path, typer.Argument(help="One JSON object per line: question, image or images, id, system.")
]
Target = Annotated[Path, typer.Argument(help="Answers; lines that it has already are skipped.")]
Folder = Annotated[
    Path | None, typer.Option(help="Where the pictures are; beside the file when left out.")
]
Rows = Annotated[int, typer.Option(min=1, help="Most questions that are answered at once.")]

EXIT_NO_ANSWER = 1
"""Exit code when no line has an answer."""


def batch(
    source: Source, target: Target, images: Folder = None, rows: Rows = 16, *, how: ChatOptions
) -> None:
    """Answer the questions of a file, many at a time; run again after a stop, it goes on.

    A line that was changed since is answered again. The exit code is 1 where no line has an answer.
    """
    lines = read_lines(source)
    with AnswerFile(target, lines, source=source) as answers:
        if not how.quiet:
            _say_what_is_there(answers, len(lines), target)
        waiting = [line for line in lines if line.number not in answers.done]
        folder = images or source.parent
        if waiting and not how.quiet:
            _warn_of_placeholders(waiting, folder)
        if waiting:
            results = answer_lines(how.load(max_rows=rows), waiting, folder, how.sampling)
            errors = write_results(results, answers, total=len(waiting), quiet=how.quiet)
            if errors and not how.quiet:
                note(f"{errors} of {len(waiting)} lines have an error, see {target}")
        if not answers.num_answers and lines:
            raise typer.Exit(EXIT_NO_ANSWER)


def _say_what_is_there(answers: AnswerFile, num_lines: int, target: Path) -> None:
    if answers.done:
        note(f"{len(answers.done)} of {num_lines} lines are in {target} already")
    if answers.stale:
        note(
            f"{answers.stale} answers are to lines that were changed since: they are now in "
            f"{answers.old}, and the lines are answered again"
        )


def _warn_of_placeholders(lines: Sequence[Line], folder: Path) -> None:
    """Say in one line where <image> stands in a question beside pictures."""
    for line in lines:
        if PLACEHOLDER.encode() in line.content:
            messages = line.question(folder).messages
            if messages and messages[-1].media and PLACEHOLDER in messages[-1].text:
                note(f"line {line.number}: {STAYED_TEXT}")
                return


def answer_lines(
    session: "Chat", lines: Sequence[Line], folder: Path, sampling: Sampling
) -> Iterator[Result]:
    """Yield a result for every line, in the order in which they are finished.

    Questions are answered together. Where that ends in an error of all (a fault in the model's
    arithmetic, or in ours), those that were on their way are asked one by one, so that the error
    stays with the line that it belongs to, and the rest goes on together.
    """
    params = SamplingParams.from_options(**sampling)
    questions = [line.question(folder) for line in lines]
    yield from (question.head for question in questions if not question.messages)
    waiting = [question for question in questions if question.messages]
    while waiting:
        taken: list[Question] = []
        answered: set[int] = set()
        try:
            for at, answer in session.as_completed(_conversations(waiting, taken), params):
                answered.add(at)
                yield taken[at].head | describe(answer)
        except Exception:  # noqa: BLE001 - whatever it was, the lines have to be told apart
            for at, question in enumerate(taken):
                if at not in answered:
                    yield question.head | _answer_alone(session, question.messages, params)
        waiting = waiting[len(taken) :]


def _conversations(
    questions: Sequence[Question], taken: list[Question]
) -> "Iterator[tuple[Message, ...]]":
    """Yield the messages of all questions, and note which are on their way."""
    for question in questions:
        taken.append(question)
        yield question.messages


def _answer_alone(session: "Chat", messages: "Sequence[Message]", params: SamplingParams) -> Result:
    """Return the end of a line's result, whatever happens."""
    try:
        return describe(session.answer(messages, params))
    except LapilliError as error:
        return describe(error)
    except Exception as error:  # noqa: BLE001 - one line must not cost the answers to the others
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def describe(answer: "Generation | LapilliError") -> Result:
    """Return the end of a line's result."""
    if isinstance(answer, LapilliError):
        return {"error": " ".join(str(answer).split())}
    return {
        "answer": answer.text.strip(),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_len,
        "new_tokens": len(answer.token_ids),
    }


def write_results(
    results: Iterator[Result], answers: AnswerFile, *, total: int, quiet: bool
) -> int:
    """Append every result as it comes; return how many are errors."""
    errors = 0
    with counting(quiet=quiet) as show:
        for done, result in enumerate(results, 1):
            answers.add(result)
            errors += "error" in result
            show(done, total)
    return errors
