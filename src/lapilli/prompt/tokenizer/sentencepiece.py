"""Slow tokenizer: a tokenizer.model, run by the sentencepiece library.

Exactly the LlamaTokenizer of transformers 4.37.2 with `legacy` true, false or absent (= true):

    text -> cut at added tokens -> every text in between through SentencePiece on its own
      legacy      every one gets a space in front of its first word
      not legacy  only the first does

The user-defined symbols of a model (such as Yi's <|im_start|>) are found by SentencePiece itself,
wherever they stand. Where a person typed one, the text is encoded by a second processor that does
not know them.

A tokenizer.model is a protocol buffer (sentencepiece_model.proto): field 1 the pieces, 2 the
trainer's settings, 3 the normalizer's. The few fields that the sentencepiece library does not tell
are read here directly, so that nothing needs protobuf.
"""

import re
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import sentencepiece
from tokenizers import AddedToken

from lapilli.errors import CheckpointError, PromptError
from lapilli.prompt.tokenizer import (
    LLAMA_TOKENS,
    AddedTokens,
    Range,
    Token,
    Tokenizer,
    TokenizerFiles,
    clean_up,
)

SPACE = "▁"  # SentencePiece writes a space like this
NORMAL, USER_DEFINED = 1, 4
UNIGRAM, BPE = 1, 2

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# normalizer_spec { add_dummy_prefix: false }: a repeated message field is merged by every reader.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_TYPE_UNUSED = b"\x18\x05"


class Piece(NamedTuple):
    """An entry of the vocabulary; `kind` is NORMAL, USER_DEFINED or another number."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SpmModel:
    """Pieces by id, the algorithm, and what the normalizer does before it."""

    pieces: tuple[Piece, ...]
    algorithm: int
    unk_piece: str
    add_dummy_prefix: bool


class SentencePieceTokenizer(Tokenizer):
    """The slow LlamaTokenizer.

    Raises:
        CheckpointError: bytes that are not a SentencePiece model.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        super().__init__(files, defaults=LLAMA_TOKENS, padding_side="right", clean_up=False)
        self.legacy = files.config.get("legacy") is not False
        model = files.model or b""
        self._encoder = _PieceEncoder(model if self.legacy else without_dummy_prefix(model))
        self._spm = self._encoder.processor
        self._num_pieces: int = self._spm.get_piece_size()
        self._special_names = {token.content for token in self._special.all}
        self._extra_special = [token.content for token in self._special.additional]
        self._added = AddedTokens(self._special.added)
        self._register(self._special.all)
        self._mark_special(self._special_names)
        self._note_added()
        self._guard = self._special.content("unk") or LLAMA_TOKENS["unk"]
        self._guard_length = len(self._spm.encode(self._guard, out_type=str))
        self._write_around(files.config)

    @property
    def vocab_size(self) -> int:
        """Pieces and added tokens, the original's len(tokenizer)."""
        return self._num_pieces + sum(self._piece_id(name) is None for name in self._added.ids)

    def _tokens_of(self, text: str, literal: Sequence[Range]) -> list[Token]:
        """Return the tokens of a text with their characters, without BOS."""
        if not text:
            return []
        if self.legacy:
            return self._tokenize(text, literal)
        tokens = self._tokenize(SPACE + text.replace(SPACE, " "), _shifted(literal, 1))
        names = [self.id_to_token(token.id) for token in tokens[:2]]
        if len(names) > 1 and names[0] == SPACE and names[1] in self._special_names:
            tokens = tokens[1:]
        return [Token(i, max(start - 1, 0), max(end - 1, 0)) for i, start, end in tokens]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ids: runs of pieces, with added tokens set off by spaces.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        parts: list[str] = []
        run: list[str] = []
        skipped = self.special_ids if skip_special else ()
        for token in (self.id_to_token(i) for i in ids if i not in skipped):
            if token not in self._apart:
                run.append(token)
                continue
            parts += [text for text in [self._join(run)] if text]
            parts.append(token)
            run = []
        if run:
            parts.append(self._join(run))
        text = " ".join(parts)
        return clean_up(text) if self._clean_up else text

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, None where it is not in the vocabulary."""
        added = self._added.ids.get(token)
        return self._piece_id(token) if added is None else added

    def id_to_token(self, token_id: int) -> str:
        """Return the piece or added token.

        Raises:
            PromptError: an id outside the vocabulary.
        """
        added = self._added.tokens.get(token_id)
        if added is not None:
            return added.content
        if not 0 <= token_id < self._num_pieces:
            raise PromptError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return str(self._spm.id_to_piece(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text, in UTF-8."""
        token = self.id_to_token(token_id)
        if token_id in self._added.tokens:
            return token.encode()
        if self._spm.is_byte(token_id):
            return bytes([int(token[1:-1], 16)])
        return token.replace(SPACE, " ").encode()

    def add_tokens(self, tokens: Sequence[str], *, special: bool) -> int:
        """Add those `tokens` that the vocabulary lacks; return how many were new."""
        before = self.vocab_size
        new = [name for name in tokens if name not in self._added.ids]
        self._register(AddedToken(name, special=special, normalized=not special) for name in new)
        if special:
            self._mark_special(tokens)
            self._extra_special += [name for name in new if name not in self._special_names]
            self._special_names |= set(new)
        self._note_added()
        return self.vocab_size - before

    def _mark_special(self, names: Iterable[str]) -> None:
        """Let tokens that were added before stay text where a person types them."""
        for name in names:
            if name in self._added.ids:
                self._added.tokens[self._added.ids[name]].special = True

    def _piece_id(self, piece: str) -> int | None:
        index: int = self._spm.piece_to_id(piece)
        return index if self._spm.id_to_piece(index) == piece else None

    def _register(self, tokens: Iterable[AddedToken]) -> None:
        """Give every token that is not added yet the id of its piece, or the next free one."""
        for token in tokens:
            if token.content and token.content not in self._added.ids:
                index = self._piece_id(token.content)
                self._added.add(self.vocab_size if index is None else index, token)

    def _tokenize(self, text: str, literal: Sequence[Range]) -> list[Token]:
        tokens: list[Token] = []
        for start, end, index in self._added.cut(text, literal):
            if index is not None:
                tokens.append(Token(index, start, end))
                continue
            inside = [(b - start, e - start) for b, e in literal if b < end and start < e]
            found = self._encode_between(text[start:end], inside)
            tokens += found if start == 0 else [Token(i, start + b, start + e) for i, b, e in found]
        return tokens

    def _encode_between(self, text: str, literal: Sequence[Range]) -> list[Token]:
        """Encode text without added tokens; only behind a guard does a leading space survive."""
        if self.legacy or not text.startswith((SPACE, " ")):
            return self._encoder.tokenize(text, literal)
        shift = len(self._guard)
        tokens = self._encoder.tokenize(self._guard + text, _shifted(literal, shift))
        tokens = tokens[self._guard_length :]
        return [Token(i, max(b - shift, 0), max(e - shift, 0)) for i, b, e in tokens]

    def _note_added(self) -> None:
        """Note the ids that `decode` treats apart, once for every change of the vocabulary."""
        ids = self._added.ids
        self.special_ids = frozenset(ids[name] for name in self._special_names if name in ids)
        # Between spaces: added tokens that are not special, or special and not a piece.
        new = {name for name in self._extra_special if ids[name] >= self._num_pieces}
        self._apart = (set(ids) - self._special_names) | new
        self.apart_ids = frozenset(ids[name] for name in self._apart)

    def _join(self, tokens: list[str]) -> str:
        """Return the text of pieces, with special tokens in between as they are."""
        if not tokens:
            return ""
        tokens = [tokens[0].removeprefix(SPACE), *tokens[1:]]
        text = ""
        run: list[str] = []
        after_special = False
        for i, token in enumerate(tokens):
            if token not in self._special_names:
                run.append(token)
                after_special = False
                continue
            if self.legacy and i and not after_special:
                text += " "
            text += self._spm.decode_pieces(run) + token
            run = []
            after_special = True
        return str(text + self._spm.decode_pieces(run))


def _shifted(ranges: Sequence[Range], by: int) -> list[Range]:
    return [(start + by, end + by) for start, end in ranges]


def _load_processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second: of what the first would say
        raise CheckpointError(
            f"tokenizer.model ({len(model)} bytes) is not a SentencePiece model: {str(error)[:200]}"
        ) from error
    return processor


class _Pieces(dict[str, tuple[int, bool]]):
    """Ids of pieces, and whether each stands for a byte: a cache before a processor.

    Asking it takes ten times as long. Unknown text is not kept, as there is no end of it.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__()
        self.processor = processor

    def __missing__(self, piece: str) -> tuple[int, bool]:
        index = self.processor.piece_to_id(piece)
        found = (index, self.processor.is_byte(index))
        return found if index == self.processor.unk_id() else self.setdefault(piece, found)


class _PieceEncoder:
    """SentencePiece with offsets, for text without added tokens.

    `model` is a tokenizer.model, with or without dummy prefix.
    """

    def __init__(self, model: bytes) -> None:
        self.processor = _load_processor(model)
        self._model = model
        self._pieces = _Pieces(self.processor)

    def tokenize(self, text: str, literal: Sequence[Range] = ()) -> list[Token]:
        """Return the tokens of a text with their characters."""
        # Reading the whole model takes a tenth of a second: only for text that may hold a symbol.
        if not (literal and "<" in text and self._symbols.has_typed(text, literal)):
            return _with_offsets(self._pieces, text)
        tokens: list[Token] = []
        for start, end, index in self._symbols.cut(text, literal):
            if index is None:
                tokens += self._tokenize_typed(text, start, end)
            else:
                tokens.append(Token(index, start, end))
        return tokens

    @cached_property
    def _parsed(self) -> SpmModel:
        return parse_model(self._model)

    @cached_property
    def _symbols(self) -> AddedTokens:
        """User-defined pieces in angle brackets; those of spaces or digits need no protection."""
        return AddedTokens(
            {
                i: AddedToken(piece.text, special=True)
                for i, piece in enumerate(self._parsed.pieces)
                if piece.kind == USER_DEFINED and re.fullmatch(r"<.+>", piece.text)
            }
        )

    @cached_property
    def _without_symbols(self) -> _Pieces:
        """Second processor of the model, without symbols and without dummy prefix."""
        model = without_symbols(self._model, self._symbols.ids.keys())
        return _Pieces(_load_processor(without_dummy_prefix(model)))

    def _tokenize_typed(self, text: str, start: int, end: int) -> list[Token]:
        """Tokenize text[start:end] without symbols."""
        shift = int(start == 0 and self._parsed.add_dummy_prefix)
        tokens = _with_offsets(self._without_symbols, " " * shift + text[start:end])
        by = start - shift
        return [Token(i, max(b + by, start), max(e + by, start)) for i, b, e in tokens]


def _with_offsets(known: _Pieces, text: str) -> list[Token]:
    """Tokenize a text; `origin` leads from its normalized form, which pieces follow, back to it."""
    normalized, origin = known.processor.normalize(text, with_offsets=True)
    tokens: list[Token] = []
    at = pending = 0  # pending: bytes of the character at `at` that were not seen yet
    for piece in known.processor.encode(text, out_type=str):
        index, is_byte = known[piece]
        if is_byte:
            pending = pending or len(normalized[at].encode())
            tokens.append(Token(index, origin[at], origin[at + 1]))
            pending -= 1
            at += pending == 0
            continue
        end = at + len(piece)
        tokens.append(Token(index, origin[at], origin[end]))
        at = end
    return tokens


def parse_model(model: bytes) -> SpmModel:
    """Parse the content of a tokenizer.model.

    Raises:
        CheckpointError: bytes that are not a SentencePiece model.
    """
    pieces: list[Piece] = []
    settings: dict[int, dict[int, bytes | int]] = {_TRAINER: {}, _NORMALIZER: {}}
    for number, value in _fields(model):
        if isinstance(value, int):
            continue
        if number == _PIECES:
            pieces.append(_piece(value))
        elif number in settings:
            settings[number] |= dict(_fields(value))
    if not pieces:
        raise CheckpointError("tokenizer.model holds no pieces: not a SentencePiece model")
    trainer, normalizer = settings[_TRAINER], settings[_NORMALIZER]
    return SpmModel(
        pieces=tuple(pieces),
        algorithm=int(trainer.get(3, UNIGRAM)),
        unk_piece=_text(trainer.get(45, b"<unk>")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
    )


def without_dummy_prefix(model: bytes) -> bytes:
    """Return the same model that does not put a space in front of the first word."""
    return model + _NO_DUMMY_PREFIX


def without_symbols(model: bytes, symbols: Collection[str]) -> bytes:
    """Return the same model that does not recognise the user-defined `symbols` inside a text."""
    pieces: list[bytes] = []
    others: list[bytes] = []
    for number, value in _fields(model):
        if isinstance(value, int):
            continue
        if number == _PIECES:
            tail = _TYPE_UNUSED if _piece(value).text in symbols else b""
            pieces.append(_field(number, value + tail))
        else:
            others.append(_field(number, value))
    return b"".join(pieces + others)


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", _raw(fields.get(2, b"\0\0\0\0")))
    return Piece(_text(fields.get(1, b"")), score, int(fields.get(3, NORMAL)))


def _text(value: bytes | int) -> str:
    try:
        return _raw(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"tokenizer.model is damaged: {value!r} is not UTF-8") from error


def _raw(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise CheckpointError("tokenizer.model: a number stands where text is expected")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield field number and value: int for varints, the raw bytes for everything else."""
    at = 0
    while at < len(message):
        tag, at = (message[at], at + 1) if message[at] < 0x80 else _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise CheckpointError(
                f"tokenizer.model is not a whole SentencePiece model: byte {at} of {len(message)} "
                "cannot be read; is it truncated, or a Git LFS pointer?"
            )
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise CheckpointError(
        f"tokenizer.model is not a whole SentencePiece model: it ends at byte {at}; truncated?"
    )


def _field(number: int, value: bytes) -> bytes:
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
