"""`lapilli ask`: one question about some pictures."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lapilli.cli import options
from lapilli.cli.terminal import (
    PLACEHOLDER,
    STAYED_TEXT,
    note,
    open_chat,
    plain_errors,
    read_pipe_once,
)
from lapilli.errors import MediaError

if TYPE_CHECKING:
    from lapilli.generate.output import Generation
    from lapilli.pipeline import Chat

QUESTION_FIRST = 'the question comes first: lapilli ask "QUESTION" IMAGE'
Question = Annotated[str, typer.Argument(help="What you want to know.")]
Images = Annotated[
    list[str] | None,
    typer.Argument(help="Files, URLs or data URIs; - reads one from standard input."),
]


@options.with_sampling
def ask(
    question: Question,
    images: Images = None,
    model: options.Model = "pebble",
    base: options.Base = None,
    adapter: options.Adapter = None,
    template: options.Template = None,
    *,
    sampling: options.Sampling,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    speculate: options.Speculate = "auto",
    alpha: options.Alpha = "drop",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer one question about some pictures (or about none)."""
    with plain_errors():
        pictures = read_pipe_once(images or [])
        if not quiet:
            _say_what_is_odd(question, images or [])
        started = time.perf_counter()
        session = open_chat(
            model,
            quiet=quiet,
            speculate=speculate,
            base=base,
            adapter=adapter,
            template=template,
            device=device,
            dtype=dtype,
            quantize=quantize,
            alpha=alpha,
        )
        load_s = time.perf_counter() - started
        try:
            if as_json:
                _print_json(session, question, pictures, sampling, load_s=load_s)
            else:
                write_answer(session, question, pictures, sampling)
        except MediaError as error:
            if not _is_picture(question):
                raise
            raise MediaError(f"{error}; {QUESTION_FIRST}") from error
        if not quiet:
            warn_out_of_distribution(session)


def _say_what_is_odd(question: str, images: list[str]) -> None:
    """Say in one line what a question is that nobody asks."""
    if images and PLACEHOLDER in question:
        note(STAYED_TEXT)
    elif not images and _is_picture(question):
        note(f"{question} is taken for the question: {QUESTION_FIRST}")


def _is_picture(question: str) -> bool:
    """Whether a question is the name of a file, or a place to get a picture from."""
    try:
        return question.startswith(("http://", "https://", "data:", "file:")) or (
            Path(question).expanduser().is_file()
        )
    except (OSError, ValueError, RuntimeError):  # too long for a name, or "~" of nobody
        return False


def write_answer(
    session: "Chat", question: str, pictures: list[Any], sampling: dict[str, Any]
) -> None:
    """Write the answer as it comes: a terminal and a pipe both see it grow."""
    for piece in session.stream(question, *pictures, **sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _print_json(
    session: "Chat",
    question: str,
    pictures: list[Any],
    sampling: dict[str, Any],
    *,
    load_s: float,
) -> None:
    started = time.perf_counter()
    answer = session.ask(question, *pictures, **sampling)
    generation = cast("Generation", session.last)  # ask() has just set it
    typer.echo(
        json.dumps(
            {
                "answer": answer,
                "finish_reason": generation.finish_reason,
                "model": session.name,
                "template": session.template.name,
                "prompt_tokens": generation.prompt_len,
                "new_tokens": len(generation.token_ids),
                "load_s": round(load_s, 3),
                "answer_s": round(time.perf_counter() - started, 3),
            },
            ensure_ascii=False,
        )
    )


def warn_out_of_distribution(session: "Chat") -> None:
    """Say in one line when a picture is unlike those that the model was trained on."""
    warning = session.out_of_distribution()
    if warning:
        note(warning)
