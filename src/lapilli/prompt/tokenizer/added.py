"""Added tokens, and how a text is cut at them before the model of the tokenizer sees it.

Source: transformers' slow tokenizers: leftmost match, the longest of several; a token with `rstrip`
or `lstrip` swallows the spaces beside it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from lapilli.prompt.tokenizer.base import Range, overlaps
from lapilli.prompt.tokenizer.special import AddedToken


class AddedTokens:
    """Added tokens by id and by name."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self.tokens: dict[int, AddedToken] = dict(tokens)
        self.ids: dict[str, int] = {token.content: i for i, token in self.tokens.items()}
        self._pattern: re.Pattern[str] | None = None

    def add(self, index: int, token: AddedToken) -> None:
        """Add a token, or replace the one with this id."""
        self.tokens[index] = token
        self.ids[token.content] = index
        self._pattern = None

    def matches(self, text: str, literal: Sequence[Range]) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of every added token in the text that touches no literal range."""
        if self._pattern is None:
            names = sorted((name for name in self.ids if name), key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
        at = 0
        while (match := self._pattern.search(text, at)) is not None:
            start, end = match.span()
            index = self.ids[match.group()]
            if overlaps(start, end, literal) or not self._stands_alone(text, start, end, index):
                at = start + 1
                continue
            yield start, end, index
            at = end

    def cut(
        self, text: str, literal: Sequence[Range] = ()
    ) -> Iterator[tuple[int, int, int | None]]:
        """Stretches (start, end, id) in order; id None is ordinary text, never empty."""
        at = 0
        for start, end, index in self.matches(text, literal):
            token = self.tokens[index]
            stop = at + len(text[at:start].rstrip()) if token.lstrip else start
            if stop > at:
                yield at, stop, None
            yield start, end, index
            at = len(text) - len(text[end:].lstrip()) if token.rstrip else end
        if at < len(text):
            yield at, len(text), None

    def _stands_alone(self, text: str, start: int, end: int, index: int) -> bool:
        if not self.tokens[index].single_word:
            return True
        before, after = text[start - 1 : start], text[end : end + 1]
        return before in ("", " ") and after in ("", " ")
