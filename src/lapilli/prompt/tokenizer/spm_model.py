"""The few fields of a SentencePiece model file that the library itself does not tell.

A tokenizer.model is a protocol buffer (sentencepiece_model.proto): field 1 the pieces, 2 the
trainer's settings, 3 the normalizer's. Read here directly, so that nothing needs protobuf.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lapilli.errors import CheckpointError

NORMAL, USER_DEFINED = 1, 4
UNIGRAM, BPE = 1, 2

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# normalizer_spec { add_dummy_prefix: false }: a repeated message field is merged by every reader.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_TYPE_UNUSED = b"\x18\x05"
# What nearly every piece ends with: tag and score, and tag and kind where it is not NORMAL.
_TEXT_TAG, _SCORE_TAG, _KIND_TAG = 0x0A, 0x15, 0x18
_SCORE = struct.Struct("<Bf")
_SCORE_AND_KIND = struct.Struct("<BfBB")


class Piece(NamedTuple):
    """An entry of the vocabulary; `kind` is NORMAL, USER_DEFINED or another number."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SpmModel:
    """Pieces by id, the algorithm, and what the normalizer does before it."""

    pieces: tuple[Piece, ...]
    algorithm: int = UNIGRAM
    unk_piece: str = "<unk>"
    add_dummy_prefix: bool = True


def parse(model: bytes) -> SpmModel:
    """The model's fields.

    Raises:
        CheckpointError: bytes that are not a SentencePiece model.
    """
    pieces: list[Piece] = []
    trainer: dict[int, bytes | int] = {}
    normalizer: dict[int, bytes | int] = {}
    for number, value in _fields(model):
        if number == _PIECES and isinstance(value, bytes):
            pieces.append(_usual_piece(value) or _piece(value))
        elif number == _TRAINER and isinstance(value, bytes):
            trainer |= dict(_fields(value))
        elif number == _NORMALIZER and isinstance(value, bytes):
            normalizer |= dict(_fields(value))
    if not pieces:
        raise CheckpointError("tokenizer.model holds no pieces: not a SentencePiece model")
    return SpmModel(
        pieces=tuple(pieces),
        algorithm=int(trainer.get(3, UNIGRAM)),
        unk_piece=_text(trainer.get(45, b"<unk>")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
    )


def without_dummy_prefix(model: bytes) -> bytes:
    """The same model that does not put a space in front of the first word."""
    return model + _NO_DUMMY_PREFIX


def without_symbols(model: bytes, symbols: frozenset[str]) -> bytes:
    """The same model that does not recognise the user-defined `symbols` inside a text."""
    parts = []
    for number, value in _fields(model):
        if number != _PIECES or not isinstance(value, bytes):
            continue
        tail = _TYPE_UNUSED if _piece(value).text in symbols else b""
        parts.append(_field(_PIECES, value + tail))
    parts += [
        _field(number, value)
        for number, value in _fields(model)
        if number != _PIECES and isinstance(value, bytes)
    ]
    return b"".join(parts)


def _usual_piece(message: bytes) -> Piece | None:
    """What `_piece` reads, from the one layout that SentencePiece itself writes; else None.

    A vocabulary has tens of thousands of pieces, and field by field they would take a second.
    """
    if len(message) < 2 or message[0] != _TEXT_TAG or message[1] >= 0x80:
        return None
    end = 2 + message[1]
    rest = len(message) - end
    kind, kind_tag = NORMAL, _KIND_TAG
    if rest == _SCORE.size:
        score_tag, score = _SCORE.unpack_from(message, end)
    elif rest == _SCORE_AND_KIND.size:
        score_tag, score, kind_tag, kind = _SCORE_AND_KIND.unpack_from(message, end)
    else:
        return None
    if score_tag != _SCORE_TAG or kind_tag != _KIND_TAG or kind >= 0x80:
        return None
    return Piece(_text(message[2:end]), score, kind)


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
    """Field number and value: int for varints, the raw bytes for everything else."""
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
