"""Text to token ids and back, exactly as the tokenizers that checkpoints were trained with.

Knows file contents (bytes, parsed JSON), never a disk: `build_tokenizer` is the entry.

Decoding token by token: the text of an answer is

    b"".join(token_bytes(i) for i in ids that are not special)

decoded as UTF-8. SentencePiece writes a space before the first word, which `decode` drops (the slow
tokenizer with `legacy` a second one too). A character may span several tokens, so a stream holds
bytes back until they are whole. Only where bytes never become valid UTF-8 may `decode` show another
number of replacement characters.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import AddedToken

from lapilli.errors import MissingFileError
from lapilli.prompt.tokenizer.added import AddedTokens, Range, read_special_tokens

_NO_LIMIT = 10**9


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
        files: of the tokenizer.
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

    @abstractmethod
    def tokenize(self, text: str, *, literal: Sequence[Range] = ()) -> list[Token]:
        """Return the tokens of a text with the characters they stand for, without prefix.

        Special tokens are recognised, except where they touch a `literal` range.
        """

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
