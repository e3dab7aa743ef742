"""SentencePiece model files: read, changed, and converted for the `tokenizers` library.

A tokenizer.model is a protocol buffer (sentencepiece_model.proto): field 1 the pieces, 2 the
trainer's settings, 3 the normalizer's. The few fields that the sentencepiece library does not tell
are read here directly, so that nothing needs protobuf.
"""

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lapilli.errors import CheckpointError

SPACE = "▁"  # SentencePiece writes a space like this
NORMAL, USER_DEFINED = 1, 4
UNIGRAM, BPE = 1, 2

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# normalizer_spec { add_dummy_prefix: false }: a repeated message field is merged by every reader.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_TYPE_UNUSED = b"\x18\x05"
_LLAMA_NAMES = ("<unk>", "<s>", "</s>")


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


def parse(model: bytes) -> SpmModel:
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


def llama_tokenizer(model: bytes, *, legacy: bool = True) -> Tokenizer:
    """Convert a tokenizer.model of Llama or Mistral for the `tokenizers` library.

    Args:
        model: content of tokenizer.model.
        legacy: a space is written before the first word of every text between added tokens;
            False: at the beginning of a text alone, as slow tokenizers with `legacy: false` do.

    Raises:
        CheckpointError: a unigram, word or character model.

    Note: the first three pieces are called <unk>, <s> and </s> whatever the file calls them, and
        text that no piece covers becomes bytes. Source: what transformers 4.37.2 builds for
        LlamaTokenizerFast when a checkpoint has only a tokenizer.model.
    """
    parsed = parse(model)
    if parsed.algorithm != BPE:
        raise CheckpointError(
            f"tokenizer.model holds algorithm {parsed.algorithm}, expected BPE ({BPE}): "
            "use the slow tokenizer, or give a tokenizer.json"
        )
    others = parsed.pieces[len(_LLAMA_NAMES) :]
    scores = dict.fromkeys(_LLAMA_NAMES, 0.0) | {piece.text: piece.score for piece in others}
    vocab = {text: i for i, text in enumerate((*_LLAMA_NAMES, *(p.text for p in others)))}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges(scores, {piece.text: i for i, piece in enumerate(parsed.pieces)}),
            unk_token=parsed.unk_piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE, prepend_scheme="first", split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in _LLAMA_NAMES])
    return tokenizer


def merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges of a BPE vocabulary that lists only its pieces.

    Every way to cut a piece into two pieces is a merge, ranked by the score of what it makes, then
    by the id of its first half.

    Args:
        scores: of the pieces that merges may make.
        ids: of the pieces that may be merged.
    """
    found: list[tuple[str, str]] = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        cuts = [
            (first, piece[at:])
            for at in range(1, len(piece))
            if (first := piece[:at]) in ids and piece[at:] in ids
        ]
        found += sorted(cuts, key=lambda cut: ids[cut[0]])
    return found
