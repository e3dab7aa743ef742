"""Added tokens, and how a text is cut at them before the model of the tokenizer sees it.

An added token is found wherever it stands, in what a person typed too; a special one is text there.

Source: transformers' slow tokenizers and the `tokenizers` library: leftmost match, the longest of
several; a token with `rstrip` or `lstrip` swallows the spaces beside it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from lapilli.prompt.tokenizer.base import Range, overlaps
from lapilli.prompt.tokenizer.special import AddedToken


class AddedTokens:
    """Added tokens by id and by name.

    Args:
        tokens: by id; those that are `special` stay text where a person typed them.
        by_words: what a `single_word` token may not touch is a letter or digit, as the `tokenizers`
            library has it; else whatever is no space.
    """

    def __init__(self, tokens: Mapping[int, AddedToken], *, by_words: bool = False) -> None:
        self.tokens: dict[int, AddedToken] = dict(tokens)
        self.ids: dict[str, int] = {token.content: i for i, token in self.tokens.items()}
        self._touching = re.compile(r"\w" if by_words else r"[^ ]")
        self._pattern: re.Pattern[str] | None = None

    def add(self, index: int, token: AddedToken) -> None:
        """Add a token, or replace the one with this id."""
        self.tokens[index] = token
        self.ids[token.content] = index
        self._pattern = None

    def has_typed(self, text: str, literal: Sequence[Range]) -> bool:
        """Whether a special token stands in a literal range, or partly in one."""
        at = 0
        while literal and (match := self._compiled().search(text, at)) is not None:
            if self._is_typed(*match.span(), match.group(), literal):
                return True
            at = match.start() + 1
        return False

    def matches(self, text: str, literal: Sequence[Range]) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of every added token in the text but special ones in literal ranges."""
        at = 0
        while (match := self._compiled().search(text, at)) is not None:
            name = self._found(text, match.start(), match.group(), literal)
            if name is None:
                at = match.start() + 1
                continue
            start, end = match.start(), match.start() + len(name)
            if self._stands_alone(text, start, end, self.ids[name]):
                yield start, end, self.ids[name]
            at = end

    def cut(
        self, text: str, literal: Sequence[Range] = (), *, ids: AbstractSet[int] | None = None
    ) -> Iterator[tuple[int, int, int | None]]:
        """Stretches (start, end, id) in order; id None is ordinary text, never empty.

        Args:
            text: is cut.
            literal: typed by a person.
            ids: of the tokens that it is cut at; None: at all.
        """
        at = 0
        for start, end, index in self.matches(text, literal):
            if start < at or not (ids is None or index in ids):
                continue
            token = self.tokens[index]
            stop = at + len(text[at:start].rstrip()) if token.lstrip else start
            if stop > at:
                yield at, stop, None
            yield start, end, index
            at = len(text) - len(text[end:].lstrip()) if token.rstrip else end
        if at < len(text):
            yield at, len(text), None

    def _compiled(self) -> re.Pattern[str]:
        if self._pattern is None:
            names = sorted((name for name in self.ids if name), key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
        return self._pattern

    def _found(self, text: str, start: int, name: str, literal: Sequence[Range]) -> str | None:
        """The token at a place: `name`, or a shorter one where a person typed a part of that."""
        if not self._is_typed(start, start + len(name), name, literal):
            return name
        shorter = (n for n in self.ids if n and len(n) < len(name) and text.startswith(n, start))
        kept = (n for n in shorter if not self._is_typed(start, start + len(n), n, literal))
        return max(kept, key=len, default=None)

    def _is_typed(self, start: int, end: int, name: str, literal: Sequence[Range]) -> bool:
        return self.tokens[self.ids[name]].special and overlaps(start, end, literal)

    def _stands_alone(self, text: str, start: int, end: int, index: int) -> bool:
        if not self.tokens[index].single_word:
            return True
        beside = text[max(start - 1, 0) : start] + text[end : end + 1]
        return self._touching.search(beside) is None
