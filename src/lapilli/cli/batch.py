"""`lapilli batch IN OUT`: many questions, a line each; may be stopped and run again.

    Line -> Question: messages, or what is wrong -> Result -> AnswerFile
      --engine local   one engine in this process, many questions at once
      --engine ray     an engine in each of several processes, on this machine or a cluster

Every line ends as an answer or as its error, whatever it holds: see questions.py and answers.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapilli.cli.answers import AnswerFile, Result, write_table
from lapilli.cli.questions import Line, Question, read_questions
from lapilli.cli.terminal import (
    PLACEHOLDER,
    STAYED_TEXT,
    ChatOptions,
    Cores,
    Engine,
    EngineKind,
    Sampling,
    StoreOfModality,
    counting,
    note,
    open_stores,
    reachable,
    reachable_stores,
)
from lapilli.config.generation import SamplingParams
from lapilli.errors import ConfigError, LapilliError

if TYPE_CHECKING:
    from lapilli.generate.output import Generation
    from lapilli.pipeline import Chat
    from lapilli.prompt.message import Message


Source = Annotated[
    Path,
    typer.Argument(
        help="One JSON object per line: question, image or images, id, system; or messages in "
        "OpenAI's form and id; a .parquet file with such columns; or a folder of pictures."
    ),
]
Retry = Annotated[bool, typer.Option("--retry", help="Ask lines again that ended in an error.")]
Target = Annotated[
    Path,
    typer.Argument(help="Answers, as JSON lines or .parquet; lines that it has are skipped."),
]
Folder = Annotated[
    Path | None, typer.Option(help="Where the pictures are; beside the file when left out.")
]
Rows = Annotated[int, typer.Option(min=1, help="Most questions that an engine answers at once.")]
Asked = Annotated[
    str | None, typer.Option("--question", help="What is asked about each picture of a folder.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Engines of Ray; as many as it has room for when left out."),
]

EXIT_NO_ANSWER = 1
"""Exit code when no line has an answer."""

_AT_ONCE = 1024  # lines of a table whose pictures are read before they are asked about


def batch(
    source: Source,
    target: Target,
    images: Folder = None,
    rows: Rows = 16,
    store: StoreOfModality = None,
    retry: Retry = False,
    question: Asked = None,
    engine: Engine = EngineKind.LOCAL,
    workers: Workers = None,
    cores: Cores = 1,
    *,
    how: ChatOptions,
) -> None:
    """Answer the questions of a file, many at a time; run again after a stop, it goes on.

    A line that was changed since is answered again; answers of another model, store or option stay.
    The exit code is 1 where no line has an answer.
    """
    stores = open_stores(store or [])
    lines = read_questions(source, question)
    table = target if target.suffix == ".parquet" else None
    path = target if table is None else beside(table)
    with AnswerFile(path, lines, source=source, retry=retry) as answers:
        if not how.quiet:
            _say_what_is_there(answers, len(lines), path)
        waiting = [line for line in lines if line.number not in answers.done]
        folder = images or (source if source.is_dir() else source.parent)
        if waiting and not how.quiet:
            _warn_of_placeholders(waiting, folder)
        if waiting:
            if engine is EngineKind.RAY:
                answerer = Answerer(
                    reachable(how), reachable_stores(store or []), folder.absolute(), rows
                )
                results = _spread(answerer, waiting, workers, cores)
            else:
                session = how.load(stores, max_rows=rows)
                names = [name for name, _ in session.config.modalities]
                results = answer_in_parts(session, waiting, folder, how.sampling, names)
            errors = write_results(results, answers, total=len(waiting), quiet=how.quiet)
            if engine is EngineKind.RAY:
                answers.sort()
            if errors and not how.quiet:
                note(f"{errors} of {len(waiting)} lines have an error, see {target}")
        if table is not None:
            write_table(answers, table)
        if not answers.num_answers and lines:
            raise typer.Exit(EXIT_NO_ANSWER)


def beside(table: Path) -> Path:
    """Return the file in which the answers of a Parquet file are while they come.

    Raises:
        ConfigError: there is the table and not that file, so that it is somebody else's.
    """
    path = table.with_name(f"{table.name}.jsonl")
    if table.exists() and not path.exists():
        raise ConfigError(
            f"{table} is there, and {path.name}, where its answers come from, is not: name another "
            "file for the answers"
        )
    return path


@dataclass(frozen=True)
class Answerer:
    """Makes what answers lines in a process of Ray's: an engine, loaded there.

    Attributes:
        how: model and sampling; its paths mean the same on every machine.
        stores: options NAME=STORE.
        folder: where relative paths of pictures begin.
        rows: questions that are answered at once.
    """

    how: ChatOptions
    stores: tuple[str, ...]
    folder: Path
    rows: int

    def __call__(self) -> "LoadedAnswerer":
        """Load the engine."""
        session = replace(self.how, quiet=True).load(open_stores(self.stores), max_rows=self.rows)
        return LoadedAnswerer(self, session)


class LoadedAnswerer:
    """Answers lines with an engine of its own."""

    def __init__(self, made_by: Answerer, session: "Chat") -> None:
        self._made_by = made_by
        self._session = session
        self._names = [name for name, _ in session.config.modalities]

    def __call__(self, lines: Sequence[Line]) -> Iterator[Result]:
        """Yield the results of lines as they are finished."""
        made_by = self._made_by
        yield from answer_lines(
            self._session, lines, made_by.folder, made_by.how.sampling, self._names
        )


def _spread(
    answerer: Answerer, lines: Sequence[Line], workers: int | None, cores: int
) -> Iterator[Result]:
    """Yield the results of lines that processes of Ray answer, as they come."""
    from lapilli.cluster import check_room, connect, room, share_of
    from lapilli.pipeline.distributed import answer_distributed

    ray = connect("--engine ray needs Ray", "leave --engine out")
    share = share_of(ray, cores=cores, device=answerer.how.device)
    workers = workers or room(ray, share)
    check_room(ray, share, workers)
    yield from answer_distributed(
        ray, lines, answerer, workers=workers, share=share, at_once=4 * answerer.rows
    )


def _say_what_is_there(answers: AnswerFile, num_lines: int, target: Path) -> None:
    if answers.done:
        note(f"{len(answers.done)} of {num_lines} lines are in {target} already")
    if answers.stale:
        note(
            f"{answers.stale} results are errors that are retried, or of lines that were changed "
            f"since: they are now in {answers.old}, and the lines are answered again"
        )


def _warn_of_placeholders(lines: Sequence[Line], folder: Path) -> None:
    """Say in one line where <image> stands in a question beside pictures."""
    for line in lines:
        if PLACEHOLDER.encode() in line.content:
            messages = line.question(folder).messages
            if messages and messages[-1].media and PLACEHOLDER in messages[-1].text:
                note(f"line {line.number}: {STAYED_TEXT}")
                return


def answer_in_parts(
    session: "Chat",
    lines: Sequence[Line],
    folder: Path,
    sampling: Sampling,
    modalities: Sequence[str] = (),
) -> Iterator[Result]:
    """Yield what `answer_lines` does; of a table's pictures, only those of a part are in memory."""
    size = _AT_ONCE if lines[0].table is not None else len(lines)
    for at in range(0, len(lines), size):
        yield from answer_lines(session, lines[at : at + size], folder, sampling, modalities)


def answer_lines(
    session: "Chat",
    lines: Sequence[Line],
    folder: Path,
    sampling: Sampling,
    modalities: Sequence[str] = (),
) -> Iterator[Result]:
    """Yield a result for every line, in the order in which they are finished.

    `modalities` are the names that the checkpoint declares.

    Questions are answered together. Where that ends in an error of all (a fault in the model's
    arithmetic, or in ours), those that were on their way are asked one by one, so that the error
    stays with the line that it belongs to, and the rest goes on together.
    """
    params = SamplingParams.from_options(**sampling)
    questions = [line.question(folder, modalities) for line in lines]
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
