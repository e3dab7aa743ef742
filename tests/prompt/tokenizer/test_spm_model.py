"""The fields of a SentencePiece model file, against the library that reads the same file."""

import struct
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import CheckpointError
from lapilli.prompt.tokenizer import spm_model
from lapilli.prompt.tokenizer.spm_model import Piece


def field(number: int, content: bytes) -> bytes:
    """A field of bytes; lengths below 16384."""
    size = len(content)
    length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([number << 3 | 2]) + length + content


def piece(text: str, score: float | None, kind: int | None) -> bytes:
    """A piece as SentencePiece writes it: text, score, kind."""
    message = field(1, text.encode())
    message += b"" if score is None else b"\x15" + struct.pack("<f", score)
    return message + (b"" if kind is None else bytes([3 << 3, kind]))


def test_pieces_are_those_of_the_library(goldens: Any) -> None:
    library = sentencepiece.SentencePieceProcessor()
    library.load_from_serialized_proto(goldens.spm)
    parsed = spm_model.parse(goldens.spm)
    assert len(parsed.pieces) == library.get_piece_size()
    for i, found in enumerate(parsed.pieces):
        assert found.text == library.id_to_piece(i)
        assert found.score == library.get_score(i)
        assert (found.kind == 6) == library.is_byte(i)
        assert (found.kind == 3) == library.is_control(i)


@settings(deadline=None)
@given(
    text=st.text(max_size=150),
    score=st.none() | st.floats(width=32, allow_nan=False),
    kind=st.none() | st.integers(1, 6),
    more=st.sampled_from([b"", b"\x22\x01\x15", b"\x20\x07", b"\x15\0\0\x80\x3f"]),
)
def test_the_usual_layout_is_read_as_any_other(
    text: str, score: float | None, kind: int | None, more: bytes
) -> None:
    message = piece(text, score, kind) + more
    usual = spm_model._usual_piece(message)
    assert usual is None or usual == spm_model._piece(message)
    (found,) = spm_model.parse(field(1, message)).pieces
    if not more:
        assert found == Piece(text, score or 0.0, kind or spm_model.NORMAL)
        assert usual is not None or score is None or len(text.encode()) > 127


def test_text_that_is_not_utf_8_is_refused() -> None:
    model = field(1, field(1, b"\xff\xfe") + b"\x15\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"tokenizer.model is damaged: .* is not UTF-8"):
        spm_model.parse(model)
