"""Special and added tokens: read from the files of a tokenizer, and found in a text.

An added token is cut out of a text before the model of the tokenizer sees it, wherever it stands;
a special one that a person typed is ordinary text.

Source: transformers 4.37.2 loading a tokenizer: `added_tokens_decoder` of tokenizer_config.json
where it exists, otherwise special_tokens_map.json over the configuration, and added_tokens.json.
For matching its slow tokenizers and the `tokenizers` library: leftmost match, the longest of
several; a token with `rstrip` or `lstrip` takes the spaces beside it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import AddedToken

from lapilli.errors import CheckpointError

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Order in which missing special tokens get new ids."""
LLAMA_TOKENS: Mapping[str, str] = MappingProxyType({"bos": "<s>", "eos": "</s>", "unk": "<unk>"})
"""Special tokens of the Llama family where no file names others."""
_MOST_DIGITS = 9  # of an id

Range = tuple[int, int]
"""Characters [start, end) of a text."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`named`: role -> token; `additional`: further special ones; `added`: id -> token."""

    named: Mapping[str, AddedToken]
    additional: tuple[AddedToken, ...]
    added: Mapping[int, AddedToken]

    @property
    def all(self) -> tuple[AddedToken, ...]:
        """Every special token once, in the order of `ROLES`, then the additional ones."""
        tokens = [self.named[role] for role in ROLES if role in self.named]
        return tuple({t.content: t for t in reversed([*tokens, *self.additional])}.values())[::-1]

    def content(self, role: str) -> str | None:
        """Return the text of the token with a role, or None."""
        return self.named[role].content if role in self.named else None


def read_special_tokens(
    config: Mapping[str, object],
    special_map: Mapping[str, object],
    added: Mapping[str, int],
    *,
    defaults: Mapping[str, str],
) -> SpecialTokens:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    Raises:
        CheckpointError: a token that is neither a string nor an object with `content`.
    """
    settings = {f"{role}_token": token for role, token in defaults.items()} | dict(config)
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, Mapping):
        listed = None
        settings |= special_map
    named = {
        role: _token(settings[f"{role}_token"], special=True)
        for role in ROLES
        if settings.get(f"{role}_token") is not None
    }
    extra = settings.get("additional_special_tokens")
    contents = extra if isinstance(extra, Sequence) and not isinstance(extra, str) else ()
    additional = tuple(_token(content, special=True) for content in contents)
    if listed is not None:
        by_id = {_id(key): _token(entry, special=False) for key, entry in listed.items()}
    else:
        special = {token.content for token in (*named.values(), *additional)}
        by_id = {i: _token(content, special=content in special) for content, i in added.items()}
    return SpecialTokens(named, additional, by_id)


def _id(key: object) -> int:
    text = str(key)
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise CheckpointError(
            f"tokenizer_config.json: added_tokens_decoder has the key {text[:50]!r}, expected an id"
        )
    return int(text)


def _token(value: object, *, special: bool) -> AddedToken:
    """Return the token that is written as a string, or as an object that may say more of it."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return AddedToken(
            value["content"],
            special=special or bool(value.get("special", False)),
            normalized=bool(value.get("normalized", not special)),
            lstrip=bool(value.get("lstrip", False)),
            rstrip=bool(value.get("rstrip", False)),
            single_word=bool(value.get("single_word", False)),
        )
    raise CheckpointError(
        f"special token {value!r:.100}: expected a string or an object with `content`, as in "
        "special_tokens_map.json"
    )


class AddedTokens:
    """Added tokens by id and by content, and the places where they stand in a text.

    Args:
        tokens: by id; those that are `special` stay text where a person typed them.
        by_words: a `single_word` token may not touch a letter or digit, as in the `tokenizers`
            library; False: it may touch nothing but spaces.
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
        """Return whether a special token stands in a literal range, or partly in one."""
        at = 0
        while literal and (match := self._compiled().search(text, at)) is not None:
            if self._is_typed(match.start(), match.group(), literal):
                return True
            at = match.start() + 1
        return False

    def cut(
        self, text: str, literal: Sequence[Range] = (), *, ids: AbstractSet[int] | None = None
    ) -> Iterator[tuple[int, int, int | None]]:
        """Yield parts (start, end, id) in order; id None is ordinary text, never empty.

        Args:
            text: is cut.
            literal: typed by a person.
            ids: of the tokens that it is cut at; None: all of them.
        """
        at = 0
        for start, end, index in self._matches(text, literal):
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

    def _matches(self, text: str, literal: Sequence[Range]) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, id) of every token but special ones in literal ranges."""
        at = 0
        while (match := self._compiled().search(text, at)) is not None:
            start, content = match.start(), match.group()
            if self._is_typed(start, content, literal):
                # A shorter token may end before what a person typed.
                shorter = (c for c in self.ids if c and content != c and content.startswith(c))
                kept = (c for c in shorter if not self._is_typed(start, c, literal))
                content = max(kept, key=len, default="")
            if not content:
                at = start + 1
                continue
            at, index = start + len(content), self.ids[content]
            beside = text[max(start - 1, 0) : start] + text[at : at + 1]
            if not (self.tokens[index].single_word and self._touching.search(beside)):
                yield start, at, index

    def _compiled(self) -> re.Pattern[str]:
        if self._pattern is None:
            contents = sorted(filter(None, self.ids), key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, contents)) if contents else r"(?!)")
        return self._pattern

    def _is_typed(self, start: int, content: str, literal: Sequence[Range]) -> bool:
        is_special = self.tokens[self.ids[content]].special
        return is_special and overlaps(start, start + len(content), literal)


def overlaps(start: int, end: int, ranges: Sequence[Range]) -> bool:
    """Return whether characters [start, end) touch one of the ranges."""
    return any(start < stop and begin < end for begin, stop in ranges)
