"""A tokenizer.json in the hands of the `tokenizers` library, and the checks of what it says.

The library is written in Rust. What it did not expect of a file ends in a panic: no Exception, and
several lines on standard error. And it follows every step that a file lists, so that a few steps
which double the text make gigabytes of one question.
"""

import base64
import binascii
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import tokenizers

from lapilli.errors import CheckpointError

MOST_STEPS: Final = 100
MOST_GROWTH: Final = 64
"""Most times that a text may become longer by what a file replaces; honest files: twice."""
MOST_ADDED: Final = 1000
_SHOWN = 200


def parse_tokenizer(source: str) -> tokenizers.Tokenizer:
    """Parse a tokenizer.json; truncation and padding are left out.

    Raises:
        CheckpointError: a text that the library does not read, or steps that make a text grow.
    """
    advice = "; is it truncated, or written by a newer `tokenizers`?"
    with _quiet(), library_errors(f"({len(source)} characters) cannot be read", advice):
        tokenizer = tokenizers.Tokenizer.from_str(source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for part in ("normalizer", "decoder"):
        _check_growth(part, state_of(getattr(tokenizer, part)))
    return tokenizer


def state_of(part: Any) -> dict[str, Any]:  # noqa: ANN401 - any part of a tokenizer
    """Return a part of a tokenizer as the JSON that it is saved as; empty where there is none."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


@contextmanager
def library_errors(failed: str | None = None, advice: str = "") -> Iterator[None]:
    """Turn a panic of the library inside into an error of the file that it follows.

    Args:
        failed: what went wrong where the library raises an Exception; None: it is let through.
        advice: behind the library's own words.

    Raises:
        CheckpointError: for a panic, and for an Exception where `failed` is given.
    """
    try:
        yield
    except BaseException as error:  # a panic of Rust is no Exception, and not importable by name
        if type(error).__name__ == "PanicException":
            raise CheckpointError(
                f"tokenizer.json: the library tokenizers fails on it: {str(error)[:_SHOWN]}"
            ) from None
        if failed is None or not isinstance(error, Exception):
            raise
        # The library raises nothing more precise.
        raise CheckpointError(f"tokenizer.json {failed}: {str(error)[:_SHOWN]}{advice}") from error


def encode_text(
    tokenizer: tokenizers.Tokenizer, text: str, *, special: bool = False
) -> tokenizers.Encoding:
    """Encode a text.

    Args:
        tokenizer: of a file.
        text: to encode.
        special: let the post-processor write what it writes around a text.

    Raises:
        CheckpointError: the file gives no way to encode it.
    """
    with library_errors(f"cannot encode {text[:20]!r}"):
        encoding = tokenizer.encode(text, add_special_tokens=special)
    if max((end for _, end in encoding.offsets), default=0) > len(text):
        raise CheckpointError("tokenizer.json: tokens have places outside of the text")
    return encoding


def prefix_and_suffix(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor writes before and after a text.

    Raises:
        CheckpointError: it changes the text itself, or writes what no vocabulary has.
    """
    with _quiet():
        bare = encode_text(tokenizer, "a").ids
        full = encode_text(tokenizer, "a", special=True).ids
    before = next(
        (i for i in range(len(full)) if full[i : i + len(bare)] == bare), None if full else 0
    )
    if before is None or len(full) - len(bare) > MOST_ADDED:
        raise CheckpointError(
            f"tokenizer.json: the post_processor makes {len(full)} tokens of {len(bare)}, expected "
            "the same ones between a few others"
        )
    prefix, suffix = tuple(full[:before]), tuple(full[before + len(bare) :])
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    unknown = next((i for i in (*prefix, *suffix) if i >= size), None)
    if unknown is not None:
        raise CheckpointError(
            f"tokenizer.json: the post_processor writes token {unknown}, the vocabulary has {size}"
        )
    return prefix, suffix


def _check_growth(part: str, state: Mapping[str, Any]) -> None:
    steps = list(_steps(state))
    # What Unicode forms make longer are few letters, and only once.
    growth = math.prod(_growth(step) for step in steps)
    if len(steps) > MOST_STEPS or growth > MOST_GROWTH:
        raise CheckpointError(
            f"tokenizer.json: the {part} has {len(steps)} steps that make a text up to "
            f"{growth:.0f} times as long, expected at most {MOST_STEPS} and {MOST_GROWTH}"
        )


def _steps(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or decoder in order, sequences opened."""
    inner = state.get("normalizers") or state.get("decoders")
    if inner is None:
        yield state
        return
    for one in inner:
        yield from _steps(one)


def _growth(step: Mapping[str, Any]) -> float:
    """Return how many times longer a step may make a text."""
    kind = step.get("type")
    if kind == "Replace":
        literal = step["pattern"].get("String")
        content = len(step["content"])
        return max(1.0, content / len(literal)) if literal else 1.0 + content
    if kind == "Prepend":  # once, before the whole text
        return 1.0 + len(step["prepend"]) / MOST_ADDED
    if kind == "Precompiled":
        return _charsmap_growth(step["precompiled_charsmap"])
    return 1.0


def _charsmap_growth(charsmap: str) -> float:
    """Return how many times longer a charsmap of SentencePiece may make a text.

    Source: sentencepiece normalizer.cc: the size of a trie, the trie, and texts that end with 0.
    """
    try:
        blob = base64.b64decode(charsmap)
    except binascii.Error:
        return math.inf
    texts = blob[4 + int.from_bytes(blob[:4], "little") :].split(b"\0")
    # Its own ligatures become up to 18 characters, none of them in a text of many.
    return max(1.0, max(map(len, texts)) / (18 * 4))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold standard error back until the end, and drop what was written where an error leaves."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except CheckpointError:
            said.truncate(0)
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            if text := said.read():
                os.write(2, text)
