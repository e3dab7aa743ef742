"""`lapilli batch IN.jsonl OUT.jsonl`: many questions, a line each; may be stopped and run again.

    in    {"question": "...", "images": ["a.png"], "id": 7}      paths beside the file, any id
    out   {"line": 1, "id": 7, "answer": "...", ...} or {"line": 1, "id": 7, "error": "..."}

Lines are written as they are answered, each in one piece: whatever ends the program, what is in the
file is whole but for a torn last line, which the next run drops.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from lapilli.cli import options
from lapilli.cli.terminal import note, open_chat, plain_errors
from lapilli.errors import LapilliError, PromptError

if TYPE_CHECKING:
    from lapilli.generate.outputs import Generation
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

START = b'{"line": '
"""How every line of the output begins."""


def batch(
    source: Source,
    target: Target,
    model: options.Model = "pebble",
    base: options.Base = None,
    adapter: options.Adapter = None,
    template: options.Template = None,
    images: Folder = None,
    rows: Rows = 16,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    max_new_tokens: options.MaxNewTokens = 512,
    stop: options.Stop = None,
    seed: options.Seed = None,
    speculate: options.Speculate = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
) -> None:
    """Answer the questions of a file, many at a time; run again after a stop, it goes on."""
    with plain_errors():
        lines = read_lines(source)
        done = answered(target)
        waiting = [line for line in lines if line.number not in done]
        if len(waiting) < len(lines) and not quiet:
            note(f"{len(lines) - len(waiting)} of {len(lines)} lines are in {target} already")
        if not waiting:
            return
        session = open_chat(
            model,
            quiet=quiet,
            speculate=speculate,
            max_rows=rows,
            base=base,
            adapter=adapter,
            template=template,
            device=device,
            dtype=dtype,
            quantize=quantize,
        )
        sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_new_tokens": max_new_tokens,
            "stop": tuple(stop or ()),
            "seed": seed,
        }
        results = answer_lines(session, waiting, images or source.parent, sampling)
        errors = write_results(results, target, total=len(waiting), quiet=quiet)
        if errors and not quiet:
            note(f"{errors} of {len(waiting)} lines have an error, see {target}")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input, numbered from 1."""

    number: int
    text: str


def read_lines(source: Path) -> list[Line]:
    """The lines that hold something."""
    texts = source.read_text(encoding="utf-8").splitlines()
    return [Line(number, text) for number, text in enumerate(texts, 1) if text.strip()]


def answered(target: Path) -> frozenset[int]:
    """Numbers of the lines that are answered; a torn last line is cut off.

    Raises:
        PromptError: the file holds something else than answers.
    """
    if not target.exists():
        return frozenset()
    written = target.read_bytes()
    end = written.rfind(b"\n") + 1
    torn = written[end:]
    try:
        done = frozenset(int(json.loads(row)["line"]) for row in written[:end].splitlines())
    except (ValueError, KeyError, TypeError) as error:
        raise _not_ours(target) from error
    if not START.startswith(torn[: len(START)]):
        raise _not_ours(target)
    if torn:
        with target.open("r+b") as file:
            file.truncate(end)
    return done


def _not_ours(target: Path) -> PromptError:
    return PromptError(
        f"{target} holds something else than answers of lapilli batch: name another file"
    )


def answer_lines(
    session: "Chat", lines: Iterable[Line], folder: Path, sampling: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A result for every line, in the order in which they are finished."""
    from lapilli.config.generation import SamplingParams

    asked: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []

    def conversations() -> "Iterator[tuple[Message, ...]]":
        for line in lines:
            head, messages = parse(line, folder)
            if messages is None:
                unreadable.append(head)
            else:
                asked.append(head)
                yield messages

    params = SamplingParams.from_options(**sampling)
    for at, answer in session.as_completed(conversations(), params):
        while unreadable:
            yield unreadable.pop()
        yield asked[at] | describe(answer)
    yield from unreadable


def parse(line: Line, folder: Path) -> "tuple[dict[str, Any], tuple[Message, ...] | None]":
    """The beginning of a line's result, and the question; without one the result is an error."""
    from lapilli.prompt.message import Message

    head: dict[str, Any] = {"line": line.number}
    try:
        row = json.loads(line.text)
    except ValueError as error:
        return head | {"error": f"not JSON: {error}"}, None
    if not isinstance(row, dict):
        return head | {"error": "not a JSON object"}, None
    head |= {"id": row["id"]} if "id" in row else {}
    question, system = row.get("question"), row.get("system")
    pictures = row.get("images", [row["image"]] if row.get("image") else [])
    if not isinstance(question, str) or not question.strip():
        return head | {"error": 'no "question", or an empty one'}, None
    if not isinstance(pictures, list) or not all(isinstance(each, str) for each in pictures):
        return head | {"error": '"images" must be a list of paths, URLs or data URIs'}, None
    messages = [Message.system(system)] if isinstance(system, str) else []
    return head, (*messages, Message.user(question, *(_place(each, folder) for each in pictures)))


def _place(picture: str, folder: Path) -> str:
    is_elsewhere = picture.startswith(("http:", "https:", "data:", "file:"))
    return picture if is_elsewhere else str(folder / picture)


def describe(answer: "Generation | LapilliError") -> dict[str, Any]:
    """The end of a line's result."""
    if isinstance(answer, LapilliError):
        return {"error": " ".join(str(answer).split())}
    return {
        "answer": answer.text.strip(),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_len,
        "new_tokens": len(answer.token_ids),
    }


def write_results(
    results: Iterator[dict[str, Any]], target: Path, *, total: int, quiet: bool
) -> int:
    """Append every result as it comes; returns how many are errors."""
    errors = 0
    with target.open("ab", buffering=0) as file, progress(total, quiet=quiet) as bar:
        for result in results:
            file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            errors += "error" in result
            bar.advance()
    return errors


class Bar(Protocol):
    """Counts what is done."""

    def advance(self) -> None:
        """One more."""
        ...


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Bar]:
    """A bar on standard error; nothing in a pipe and with --quiet."""
    if quiet or not sys.stderr.isatty():
        yield _Silence()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        yield _RichBar(shown, total)


class _Silence:
    def advance(self) -> None:
        """Nothing is shown."""


class _RichBar:
    def __init__(self, shown: Any, total: int) -> None:  # noqa: ANN401 - rich is imported late
        self._shown = shown
        self._task = shown.add_task("", total=total)

    def advance(self) -> None:
        """One more."""
        self._shown.advance(self._task)
