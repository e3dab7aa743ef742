"""What every tokenizer of lapilli can do.

Decoding token by token: the text of an answer is

    b"".join(token_bytes(i) for i in ids that are not special)

decoded as UTF-8, without its first space where `strips_leading_space` is true (SentencePiece
writes a space before the first word; the slow tokenizer with `legacy` drops a second one). A
character may span several tokens, so a stream holds bytes back until they are whole. Bytes that
never become valid UTF-8 are the only case in which `decode` may show another number of
replacement characters.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from lapilli.prompt.tokenizer.special import AddedToken

Range = tuple[int, int]
"""Characters [start, end) of a text."""


_NO_LIMIT = 10**9


class Token(NamedTuple):
    """A token and the characters [start, end) that it stands for.

    Bytes of one character may be several tokens: all of them name that character, or the empty
    range at its start.
    """

    id: int
    start: int
    end: int


@runtime_checkable
class Tokenizer(Protocol):
    """Ids of text, text of ids."""

    @property
    def bos_id(self) -> int | None:
        """Begin of sequence."""

    @property
    def eos_id(self) -> int | None:
        """End of sequence."""

    @property
    def pad_id(self) -> int | None:
        """Padding."""

    @property
    def unk_id(self) -> int | None:
        """What unknown text becomes."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the original's len(tokenizer)."""

    @property
    def added_vocab(self) -> dict[str, int]:
        """Added tokens and their ids, the special ones among them."""

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Added tokens by id, with how they are cut out of a text."""

    @property
    def named_tokens(self) -> dict[str, str]:
        """Texts of the special tokens by the names of chat templates, such as `pad_token`."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode(skip_special=True)` leaves out."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the tokenizer writes before a text (BOS, or nothing)."""

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """What the tokenizer of the original writes after a text; `encode` never does."""

    @property
    def strips_leading_space(self) -> bool:
        """`decode` drops the space in front of the first word."""

    @property
    def padding_side(self) -> str:
        """`left` or `right`, as the files say."""

    @property
    def model_max_length(self) -> int | None:
        """The longest text that the files allow, in tokens."""

    def encode(
        self, text: str, *, add_bos: bool = True, literal: Sequence[Range] = ()
    ) -> list[int]:
        """Ids of a text; `add_bos` writes `prefix_ids` first, where the tokenizer has any.

        Added and special tokens are recognised, except where they touch a `literal` range.
        """

    def tokenize(self, text: str, *, literal: Sequence[Range] = ()) -> list[Token]:
        """Tokens of a text with the characters they stand for, without prefix."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids."""

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None where it is not in the vocabulary."""

    def id_to_token(self, token_id: int) -> str:
        """The token as the vocabulary writes it."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8; not necessarily whole characters."""

    def add_tokens(self, tokens: Sequence[str], *, special: bool) -> int:
        """Grow the vocabulary by those `tokens` that it lacks; how many were new."""


def overlaps(start: int, end: int, ranges: Sequence[Range]) -> bool:
    """Whether characters [start, end) touch one of the ranges."""
    return any(start < stop and begin < end for begin, stop in ranges)


def clean_up(text: str) -> str:
    """Remove the spaces before punctuation, as transformers' `clean_up_tokenization` does."""
    for joined in (".", "?", "!", ","):
        text = text.replace(f" {joined}", joined)
    text = text.replace(" ' ", "'")
    for joined in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {joined}", joined)
    return text


def shifted(ranges: Sequence[Range], by: int) -> list[Range]:
    """The ranges after `by` characters were written before the text."""
    return [(start + by, end + by) for start, end in ranges]


def length_limit(value: object) -> int | None:
    """`model_max_length` of a configuration; transformers writes 1e30 for "no limit"."""
    if not isinstance(value, int | float) or not -_NO_LIMIT <= value <= _NO_LIMIT:  # or NaN
        return None
    return int(value)
