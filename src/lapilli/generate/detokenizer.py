"""Incremental detokenizer: text from tokens as they are generated, cut before stop strings.

A character may need several tokens (byte-level BPE, byte fallback), and the first word of an
answer loses its leading space while a later one keeps it. Text that may become a stop string is
held back, so no part of one is ever shown. Imports no torch and knows no model.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lapilli.errors import PromptError

Utf8Decoder = getincrementaldecoder("utf-8")


@runtime_checkable
class TokenBytes(Protocol):
    """The part of a tokenizer (`lapilli.prompt.tokenizer.Tokenizer`) that generation needs."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends an answer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not part of a text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text, in UTF-8; not necessarily whole characters.

        Raises:
            PromptError: the tokenizer has no such token.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens without special ones."""


class IncrementalDetokenizer:
    """Decoder of a growing list of tokens that returns text as soon as it is certain.

    The pieces together, with that of `flush` at the end, are `tokenizer.decode` of all ids.

    Note:
        For bytes that are no text the number of replacement characters may differ from `decode`:
        the `tokenizers` library replaces a whole run of byte tokens, its valid characters too,
        when a part of it is invalid. Text that was returned before stays as it is here.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._silent = tokenizer.special_ids
        # Added tokens that the slow tokenizers set off by spaces; most tokenizers have none.
        self._apart: frozenset[int] = getattr(tokenizer, "apart_ids", frozenset())
        self._utf8 = Utf8Decoder(errors="replace")
        self._ids: list[int] = []
        self._length = 0  # of the text so far
        # Tokenizers differ in the white space at the beginning of a text and after a token that is
        # set off, so until other text follows it is taken from `decode`.
        self._is_open = True

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty while a character is incomplete."""
        if token_id in self._silent:
            return ""
        try:
            added = self._tokenizer.token_bytes(token_id)
        except PromptError:
            # Embeddings are often padded to more rows than the tokenizer has tokens. If a model
            # generates one of them, the answer goes on.
            return ""
        self._ids.append(token_id)
        if token_id in self._apart:
            self._utf8.reset()
            self._is_open = True
            return self._shown(self._behind())
        text = self._utf8.decode(added)
        if not self._is_open:
            return self._shown(text)
        if not text.strip():
            return ""
        self._is_open = False
        return self._shown(_white(self._behind()) + text.lstrip())

    def flush(self) -> str:
        """Return the rest: an incomplete character as a replacement character."""
        text = self._utf8.decode(b"", final=True)
        return self._shown(_white(self._behind()) + text if self._is_open else text)

    def _behind(self) -> str:
        """Return what `decode` has behind the text so far."""
        return self._tokenizer.decode(self._ids)[self._length :]

    def _shown(self, text: str) -> str:
        self._length += len(text)
        return text


def _white(text: str) -> str:
    """Return the white space that a text begins with."""
    return text[: len(text) - len(text.lstrip())]


class StopStrings:
    """Search for stop strings across tokens; the text is cut before the one completed first.

    The result does not depend on how the text is cut into pieces: among several stop strings the
    one that ends first counts, and of those the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the text that is certain now and was not returned before."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        kept = self._forming(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Return the text that was held back; call at the end."""
        held, self._held = self._held, ""
        return held

    def _forming(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
