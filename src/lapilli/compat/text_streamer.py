"""Prints an answer word by word, as transformers' TextStreamer does; knows no model."""

import sys
from io import TextIOBase

from lapilli.compat.foreign import Foreign


class TextStreamer:
    """Takes ids of one row and writes their text.

    Args:
        tokenizer: decodes the ids.
        skip_prompt: the first ids are the prompt and are not shown.
        output: where to write; None: standard output at the time of writing.
        decode_options: passed to tokenizer.decode.

    Note: text is shown up to the last space, so that a word appears once it is whole. After a line
        break the ids begin anew, so a word that follows one loses its leading space.
    """

    def __init__(
        self,
        tokenizer: Foreign,
        skip_prompt: bool = False,
        *,
        output: TextIOBase | None = None,
        **decode_options: Foreign,
    ) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_prompt
        self._output = output
        self._options = decode_options
        self._ids: list[int] = []
        self._shown = 0

    def put(self, value: Foreign) -> None:
        """Take the prompt, or the next tokens."""
        if self._skips:
            self._skips = False
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, **self._options)
        if text.endswith("\n"):
            self._write(text[self._shown :])
            self._ids, self._shown = [], 0
            return
        whole = len(text) if text and is_ideograph(text[-1]) else text.rfind(" ") + 1
        # A negative step back (text that became shorter) shows nothing, as a slice does.
        self._write(text[self._shown : whole])
        self._shown += len(text[self._shown : whole])

    def end(self) -> None:
        """Show the rest and end the line."""
        text = self._tokenizer.decode(self._ids, **self._options) if self._ids else ""
        self._write(text[self._shown :] + "\n")
        self._ids, self._shown = [], 0
        self._skips = True

    def _write(self, text: str) -> None:
        output = self._output or sys.stdout
        output.write(text)
        output.flush()


def is_ideograph(character: str) -> bool:
    """Whether a character is a Chinese one, which is a word of its own."""
    point = ord(character)
    return any(
        first <= point <= last
        for first, last in (
            (0x4E00, 0x9FFF),
            (0x3400, 0x4DBF),
            (0x20000, 0x2A6DF),
            (0x2A700, 0x2B73F),
            (0x2B740, 0x2B81F),
            (0x2B820, 0x2CEAF),
            (0xF900, 0xFAFF),
            (0x2F800, 0x2FA1F),
        )
    )
