"""SentencePiece with offsets, and with symbols that a person typed kept as text.

The user-defined symbols of a model (such as Yi's <|im_start|>) are found by SentencePiece itself,
wherever they stand. Where one stands in literal text, the text is encoded by a second processor
that does not know them.
"""

import re
from collections.abc import Sequence
from functools import cached_property

import sentencepiece

from lapilli.errors import CheckpointError
from lapilli.prompt.tokenizer import spm_model
from lapilli.prompt.tokenizer.base import Range, Token, overlaps

SPACE = "▁"  # SentencePiece writes a space like this


def load_processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """A processor for the bytes of a tokenizer.model.

    Raises:
        CheckpointError: bytes that are not a SentencePiece model.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second: of what the first would say
        raise CheckpointError(
            f"tokenizer.model ({len(model)} bytes) is not a SentencePiece model: {str(error)[:200]}"
        ) from error
    return processor


class _Pieces(dict[str, tuple[int, bool]]):
    """Ids of pieces and whether they stand for a byte, as a processor has said them once.

    Asking it again takes ten times as long. What is in no vocabulary is not kept: it has no end.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__()
        self.processor = processor

    def __missing__(self, piece: str) -> tuple[int, bool]:
        index = self.processor.piece_to_id(piece)
        found = (index, self.processor.is_byte(index))
        return found if index == self.processor.unk_id() else self.setdefault(piece, found)


class PieceEncoder:
    """Text without added tokens -> tokens with offsets.

    Args:
        model: content of tokenizer.model, with or without dummy prefix.
    """

    def __init__(self, model: bytes) -> None:
        self.processor = load_processor(model)
        self._model = model
        self._pieces = _Pieces(self.processor)

    def tokenize(self, text: str, literal: Sequence[Range] = ()) -> list[Token]:
        """Tokens and their characters."""
        # Reading the whole model takes a tenth of a second: only for text that may hold a symbol.
        symbols = self._find_symbols(text) if literal and "<" in text else []
        typed = [s for s in symbols if overlaps(s[0], s[1], literal)]
        if not typed:
            return _with_offsets(self._pieces, text)
        tokens: list[Token] = []
        at = 0
        for start, end, index in [s for s in symbols if s not in typed]:
            tokens += [*self._tokenize_blind(text, at, start), Token(index, start, end)]
            at = end
        return tokens + self._tokenize_blind(text, at, len(text))

    @cached_property
    def _parsed(self) -> spm_model.SpmModel:
        return spm_model.parse(self._model)

    @cached_property
    def _symbols(self) -> dict[str, int]:
        """User-defined pieces in angle brackets; those of spaces or digits need no protection."""
        return {
            piece.text: i
            for i, piece in enumerate(self._parsed.pieces)
            if piece.kind == spm_model.USER_DEFINED and re.fullmatch(r"<.+>", piece.text)
        }

    @cached_property
    def _blind(self) -> _Pieces:
        """The same model without symbols and without dummy prefix."""
        model = spm_model.without_symbols(self._model, frozenset(self._symbols))
        return _Pieces(load_processor(spm_model.without_dummy_prefix(model)))

    def _find_symbols(self, text: str) -> list[tuple[int, int, int]]:
        if not self._symbols:
            return []
        names = sorted(self._symbols, key=len, reverse=True)
        found = re.finditer("|".join(map(re.escape, names)), text)
        return [(*match.span(), self._symbols[match.group()]) for match in found]

    def _tokenize_blind(self, text: str, start: int, end: int) -> list[Token]:
        """Tokens of text[start:end] by a processor without symbols and without dummy prefix."""
        if start == end:
            return []
        shift = int(start == 0 and self._parsed.add_dummy_prefix)
        tokens = _with_offsets(self._blind, " " * shift + text[start:end])
        by = start - shift
        return [Token(i, max(b + by, start), max(e + by, start)) for i, b, e in tokens]


def _with_offsets(known: _Pieces, text: str) -> list[Token]:
    """Walk the pieces along the normalized text; `origin` leads from it back to `text`."""
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
