"""Text from tokens as they come: knows what bytes a token stands for, no torch and no model.

A character may need several tokens (byte-level BPE, byte fallback), and the first word of an
answer loses its leading space while a later one keeps it.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lapilli.errors import PromptError

Utf8Decoder = getincrementaldecoder("utf-8")


@runtime_checkable
class TokenBytes(Protocol):
    """What generation asks of a tokenizer; every `lapilli.prompt.tokenizer.Tokenizer` has it."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends an answer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not part of a text."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8; not necessarily whole characters.

        Raises:
            PromptError: the tokenizer has no such token.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens without special ones."""


class SettlingText:
    """The text of a growing list of tokens, handed out as soon as it is certain.

    The pieces in order, with that of `flush` at the end, are `tokenizer.decode` of all ids.

    Note:
        For bytes that are no text the number of replacement characters may differ from `decode`:
        the `tokenizers` library replaces a whole run of byte tokens, its valid characters too,
        when a part of it is invalid. What was shown stays shown here.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._silent = tokenizer.special_ids
        # Added tokens that the slow tokenizers set off by spaces; most tokenizers have none.
        self._apart: frozenset[int] = getattr(tokenizer, "apart_ids", frozenset())
        self._utf8 = Utf8Decoder(errors="replace")
        self._ids: list[int] = []
        self._length = 0  # of the text so far
        # How much white space there is at the beginning of a text, and behind a token that is set
        # off, differs from tokenizer to tokenizer: until something follows it, `decode` knows.
        self._is_open = True

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; empty while a character is incomplete."""
        if token_id in self._silent:
            return ""
        try:
            added = self._tokenizer.token_bytes(token_id)
        except PromptError:
            # Embeddings are often padded to more rows than the tokenizer has words. Trained models
            # do not say those; if one does, the answer goes on.
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
        """The rest: an incomplete character as a replacement character."""
        text = self._utf8.decode(b"", final=True)
        return self._shown(_white(self._behind()) + text if self._is_open else text)

    def _behind(self) -> str:
        """What `decode` has behind the text so far."""
        return self._tokenizer.decode(self._ids)[self._length :]

    def _shown(self, text: str) -> str:
        self._length += len(text)
        return text


def _white(text: str) -> str:
    """White space that a text begins with."""
    return text[: len(text) - len(text.lstrip())]
