"""`lapilli ask`: one question about some pictures."""

import json
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lapilli.cli.terminal import (
    PLACEHOLDER,
    STAYED_TEXT,
    ChatOptions,
    Json,
    MediaOfModality,
    StoreOfModality,
    note,
    open_stores,
    read_media,
)
from lapilli.config.reader import given_path
from lapilli.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from lapilli.generate.output import Generation
    from lapilli.pipeline import Chat

QUESTION_FIRST = 'the question comes first: lapilli ask "QUESTION" IMAGE'
Question = Annotated[str, typer.Argument(help="What you want to know.")]
Images = Annotated[
    list[str] | None,
    typer.Argument(help="Files, URLs or data URIs; - reads one from standard input."),
]


def ask(
    question: Question,
    images: Images = None,
    *,
    media: MediaOfModality = None,
    store: StoreOfModality = None,
    how: ChatOptions,
    as_json: Json = False,
) -> None:
    """Answer one question about some pictures, other media, or nothing."""
    pictures, others = read_pipe_once(images or []), read_media(media or [])
    stores = open_stores(store or [])
    if not how.quiet:
        _say_what_is_odd(question, images or [])
    started = time.perf_counter()
    session = how.load(stores)
    load_s = time.perf_counter() - started
    for name in others:
        if name == "image":
            raise ConfigError(
                "--media image: pictures stand behind the question, as QUESTION IMAGE"
            )
        session.model.modality(name)  # another name would be an option of sampling
    options = {**how.sampling, **others}
    try:
        if as_json:
            _print_json(session, question, pictures, options, load_s=load_s)
        else:
            write_answer(session, question, pictures, options)
    except MediaError as error:
        if not _is_picture(question):
            raise
        raise MediaError(f"{error}; {QUESTION_FIRST}") from error
    if not how.quiet:
        warn_of_answer(session)


def read_pipe_once(images: list[str]) -> list[str | bytes]:
    """Return the picture arguments, `-` replaced by what standard input holds.

    Raises:
        MediaError: standard input was given twice, or cannot be read.
    """
    if images.count("-") > 1:
        raise MediaError("standard input ('-') can be one picture only: it was given twice")
    if "-" not in images:
        return list(images)
    from lapilli.media.fetch import fetch

    piped = fetch("-", stdin=sys.stdin.buffer).data
    assert isinstance(piped, bytes)  # noqa: S101 - what a stream gives
    return [piped if image == "-" else image for image in images]


def _say_what_is_odd(question: str, images: list[str]) -> None:
    """Say in one line what a question is that nobody asks."""
    if images and PLACEHOLDER in question:
        note(STAYED_TEXT)
    elif not images and _is_picture(question):
        note(f"{question} is taken for the question: {QUESTION_FIRST}")


def _is_picture(question: str) -> bool:
    """Return whether a question is the name of a file, or a place to get a picture from."""
    try:
        return question.startswith(("http://", "https://", "data:", "file:")) or (
            given_path(question).is_file()
        )
    except (OSError, ValueError):  # too long for a name
        return False


def write_answer(
    session: "Chat", question: str, pictures: list[Any], options: dict[str, Any]
) -> None:
    """Write the answer as it comes: a terminal and a pipe both see it grow.

    `options` are those of sampling, and media by the names of their modalities.
    Whatever ends this, what was written of the answer is in the conversation.
    """
    with closing(session.stream(question, *pictures, **options)) as answer:
        for piece in answer:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _print_json(
    session: "Chat",
    question: str,
    pictures: list[Any],
    options: dict[str, Any],
    *,
    load_s: float,
) -> None:
    started = time.perf_counter()
    answer = session.ask(question, *pictures, **options)
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


def warn_of_answer(session: "Chat") -> None:
    """Say in one line that a picture is unlike the training's, or that the model is not sure."""
    warning = session.out_of_distribution() or session.doubt()
    if warning:
        note(warning)
