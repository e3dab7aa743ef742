"""Text from tokens as they come: knows what bytes a token stands for, no torch and no model.

A character may need several tokens (byte-level BPE, byte fallback), and the first word of an
answer loses its leading space while a later one keeps it.
"""

from codecs import getincrementaldecoder
from typing import Protocol, runtime_checkable

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

    @property
    def strips_leading_space(self) -> bool:
        """Whether a text begins without the space of its first word."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8; not necessarily whole characters."""


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
        self._at_start = tokenizer.strips_leading_space
        self._utf8 = Utf8Decoder(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; empty while a character is incomplete."""
        if token_id in self._silent:
            return ""
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """The rest: an incomplete character as a replacement character."""
        return self._utf8.decode(b"", final=True)
