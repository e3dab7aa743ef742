"""Vocabulary: the bytes of every token, and the tokens of a text, as llguidance asks for them."""

import weakref
from collections.abc import Sequence

from lapilli.errors import PromptError
from lapilli.generate.output import TokenBytes
from lapilli.prompt.tokenizer import Tokenizer

_ANCHOR = "\n"


class Vocabulary:
    """The vocabulary as llguidance reads it; the tokenizer may be gone one day.

    Text that is forced is cut into tokens, so every byte has to be a token: true of SentencePiece
    with byte tokens and of byte-level BPE. The names of the attributes are llguidance's.
    """

    bos_token_id = None

    def __init__(self, tokenizer: TokenBytes, vocab_size: int) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        silent = tokenizer.special_ids | getattr(tokenizer, "apart_ids", frozenset())
        self.eos_token_id = vocab_size
        self.special_token_ids = [*sorted(i for i in silent if i < vocab_size), vocab_size]
        self.tokens = [
            b"" if token in silent else _bytes_of(tokenizer, token) for token in range(vocab_size)
        ]
        self.tokens.append(b"")
        self.drops_space = _drops_space(tokenizer, self.tokens)
        if self.drops_space:
            # A byte that stands for a space is not dropped as the token for a space is.
            for token, said in enumerate(self.tokens):
                if said == b" " and tokenizer.decode([token]):
                    self.tokens[token] = b""
        self._ids = {text: token for token, text in enumerate(self.tokens) if text}
        for token in self.special_token_ids:
            self.tokens[token] = f"<{token}>".encode()  # each another one, or all were allowed
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the tokens of a text in the middle of an answer; their bytes are the text's.

        What they do not cover, where a vocabulary lacks bytes, is left out.
        """
        wanted = text.encode() if isinstance(text, str) else text
        tokenizer = self._tokenizer()
        if isinstance(tokenizer, Tokenizer):
            said = wanted.decode(errors="replace")
            for anchor in ("", _ANCHOR):
                ids = tokenizer.encode(
                    anchor + said, add_bos=False, literal=[(0, len(anchor) + len(said))]
                )
                found = self._behind(ids, wanted)
                if found is not None:
                    return found
        return self._longest_first(wanted)

    def _behind(self, ids: Sequence[int], wanted: bytes) -> list[int] | None:
        """Return the last of the tokens whose bytes are those wanted; None: there are none."""
        length = 0
        for at in range(len(ids) - 1, -1, -1):
            length += len(self.tokens[ids[at]]) if ids[at] < len(self.tokens) else 0
            if length >= len(wanted):
                found = list(ids[at:])
                return found if b"".join(self.tokens[i] for i in found) == wanted else None
        return None

    def _longest_first(self, wanted: bytes) -> list[int]:
        """Return tokens of the longest pieces, from the left."""
        found, at = [], 0
        while at < len(wanted):
            for end in range(min(len(wanted), at + self._longest), at, -1):
                token = self._ids.get(wanted[at:end])
                if token is not None:
                    found.append(token)
                    break
            else:
                return found
            at = end
        return found


def _bytes_of(tokenizer: TokenBytes, token_id: int) -> bytes:
    try:
        return tokenizer.token_bytes(token_id)
    except PromptError:  # embeddings may have more rows than the tokenizer has tokens
        return b""


def _drops_space(tokenizer: TokenBytes, tokens: Sequence[bytes]) -> bool:
    """Return whether the text of an answer lacks the space that its first token begins with."""
    for token_id, text in enumerate(tokens):
        if text.startswith(b" ") and text[1:].isalnum():
            return not tokenizer.decode([token_id]).startswith(" ")
    return False
