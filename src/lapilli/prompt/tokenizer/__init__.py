"""Text to token ids and back, exactly as the tokenizers that checkpoints were trained with.

Knows file contents (bytes, parsed JSON), never a disk: `build_tokenizer` is the entry.

An added token is cut out of a text before the model of the tokenizer sees it, wherever it stands;
a special one that a person typed is ordinary text. Source: transformers 4.37.2 loading a tokenizer:
`added_tokens_decoder` of tokenizer_config.json where it exists, otherwise special_tokens_map.json
over the configuration, and added_tokens.json. For matching its slow tokenizers and the `tokenizers`
library: leftmost match, the longest of several; a token with `rstrip` or `lstrip` takes the spaces
beside it.

Decoding token by token: the text of an answer is

    b"".join(token_bytes(i) for i in ids that are not special)

decoded as UTF-8. SentencePiece writes a space before the first word, which `decode` drops (the slow
tokenizer with `legacy` a second one too). A character may span several tokens, so a stream holds
bytes back until they are whole. Only where bytes never become valid UTF-8 may `decode` show another
number of replacement characters.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from tokenizers import AddedToken

from lapilli.errors import CheckpointError, MissingFileError
from lapilli.prompt.guard import check_work

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Order in which missing special tokens get new ids."""
LLAMA_TOKENS: Mapping[str, str] = MappingProxyType({"bos": "<s>", "eos": "</s>", "unk": "<unk>"})
"""Special tokens of the Llama family where no file names others."""
_MOST_DIGITS = 9  # of an id
_NO_LIMIT = 10**9  # of a length

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

        Special tokens in a `literal` range, which a person typed, are no places to cut; nor are
        tokens beyond `ids`, where these are given.
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


class Token(NamedTuple):
    """A token and the characters [start, end) that it stands for.

    Bytes of one character may be several tokens: all of them name that character, or the empty
    range at its start.
    """

    id: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """Contents of the files of a tokenizer; None or empty where a checkpoint has none.

    model: tokenizer.model. json: text of tokenizer.json. config: tokenizer_config.json.
    special_map: special_tokens_map.json. added: added_tokens.json.
    """

    model: bytes | None = None
    json: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    special_map: Mapping[str, object] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)


class Tokenizer(ABC):
    """Ids of text and text of ids.

    Args:
        defaults: texts of special tokens that no file names, by role.
        padding_side: where no file names one.
        clean_up: whether `decode` removes spaces before punctuation where no file says.

    Attributes:
        prefix_ids: what the tokenizer writes before a text (BOS, or nothing).
        suffix_ids: what the tokenizer of the original writes after a text; `encode` never does.
        special_ids: ids that `decode(skip_special=True)` leaves out.
        apart_ids: added tokens that `decode` sets off by spaces.
        padding_side: `left` or `right`.
        model_max_length: the longest text that the files allow, in tokens; None: no limit.
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    special_ids: frozenset[int]
    apart_ids: frozenset[int] = frozenset()
    _added: AddedTokens

    def __init__(
        self,
        files: TokenizerFiles,
        *,
        defaults: Mapping[str, str],
        padding_side: str,
        clean_up: bool,
    ) -> None:
        config = files.config
        self._special = read_special_tokens(
            config, files.special_map, files.added, defaults=defaults
        )
        self.padding_side = str(config.get("padding_side", padding_side))
        self.model_max_length = length_limit(config.get("model_max_length"))
        self._clean_up = bool(config.get("clean_up_tokenization_spaces", clean_up))

    def _write_around(self, config: Mapping[str, object]) -> None:
        """Set prefix and suffix by the flags of the Llama family."""
        bos = self.bos_id if config.get("add_bos_token", True) else None
        eos = self.eos_id if config.get("add_eos_token", False) else None
        self.prefix_ids = () if bos is None else (bos,)
        self.suffix_ids = () if eos is None else (eos,)

    @property
    def bos_id(self) -> int | None:
        """Begin of sequence."""
        return self._id_of("bos")

    @property
    def eos_id(self) -> int | None:
        """End of sequence."""
        return self._id_of("eos")

    @property
    def pad_id(self) -> int | None:
        """Padding; Llama's own files name none."""
        return self._id_of("pad")

    @property
    def unk_id(self) -> int | None:
        """Stand-in for text that no token covers."""
        return self._id_of("unk")

    def _id_of(self, role: str) -> int | None:
        content = self._special.content(role)
        return None if content is None else self.token_to_id(content)

    @property
    def added_vocab(self) -> dict[str, int]:
        """Added tokens and their ids, the special ones among them."""
        return dict(self._added.ids)

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Added tokens by id, with how they are cut out of a text."""
        return dict(self._added.tokens)

    @property
    def named_tokens(self) -> dict[str, str]:
        """Texts of the special tokens by the names of chat templates, such as `pad_token`."""
        return {f"{role}_token": token.content for role, token in self._special.named.items()}

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the original's len(tokenizer)."""

    def encode(
        self, text: str, *, add_bos: bool = True, literal: Sequence[Range] = ()
    ) -> list[int]:
        """Return the ids of a text, behind `prefix_ids` unless `add_bos` is False."""
        ids = [token.id for token in self.tokenize(text, literal=literal)]
        return [*self.prefix_ids, *ids] if add_bos else ids

    def tokenize(self, text: str, *, literal: Sequence[Range] = ()) -> list[Token]:
        """Return the tokens of a text with the characters they stand for, without prefix.

        Special tokens are recognised, except where they touch a `literal` range. Raises what a
        guard does that does not allow the text (prompt/guard.py).
        """
        check_work(text)
        return self._tokens_of(text, literal)

    @abstractmethod
    def _tokens_of(self, text: str, literal: Sequence[Range]) -> list[Token]:
        """Return what `tokenize` does."""

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ids.

        Raises:
            PromptError: an id outside the vocabulary of a SentencePiece model.
        """

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, None where it is not in the vocabulary."""

    @abstractmethod
    def id_to_token(self, token_id: int) -> str:
        """Return the token as the vocabulary writes it.

        Raises:
            PromptError: an id outside the vocabulary.
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text, in UTF-8; not necessarily whole characters."""

    @abstractmethod
    def add_tokens(self, tokens: Sequence[str], *, special: bool) -> int:
        """Add those `tokens` that the vocabulary lacks; return how many were new."""


def build_tokenizer(files: TokenizerFiles, *, fast: bool) -> Tokenizer:
    """Build the slow tokenizer (llama of the original) or the fast one (all other families).

    `fast` prefers tokenizer.json and builds one out of a tokenizer.model; without `fast` a
    tokenizer.model is read by SentencePiece, as the original does for every llama. Where only one
    of the files is there, that one is used.

    Raises:
        MissingFileError: neither tokenizer.model nor tokenizer.json.
        CheckpointError: a file that cannot be read.
    """
    # Here, as both files import this one.
    from lapilli.prompt.tokenizer.fast import FastTokenizer
    from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer

    if files.model is None and files.json is None:
        raise MissingFileError(
            "the checkpoint has neither tokenizer.model nor tokenizer.json: copy one of them from "
            "the language model it was made from"
        )
    is_fast = fast or files.model is None
    return FastTokenizer(files) if is_fast else SentencePieceTokenizer(files)


def clean_up(text: str) -> str:
    """Remove the spaces before punctuation, as transformers' `clean_up_tokenization` does."""
    for joined in (".", "?", "!", ","):
        text = text.replace(f" {joined}", joined)
    text = text.replace(" ' ", "'")
    for joined in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {joined}", joined)
    return text


def length_limit(value: object) -> int | None:
    """Return `model_max_length` of a configuration; transformers writes 1e30 for "no limit"."""
    if not isinstance(value, int | float) or not -_NO_LIMIT <= value <= _NO_LIMIT:  # or NaN
        return None
    return int(value)
