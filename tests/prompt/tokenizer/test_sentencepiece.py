"""SentencePiece model files: fields as the library reads them, merges as a plain loop has them."""

import struct
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lapilli.errors import CheckpointError
from lapilli.prompt.tokenizer.fast import merges
from lapilli.prompt.tokenizer.sentencepiece import NORMAL, Piece, parse_model

TEXTS = st.text("ab", max_size=7) | st.text("a\u2581\u00e9\U0001f600\ud800", max_size=4) | st.text()


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
    parsed = parse_model(goldens.spm)
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
def test_a_piece_is_read_with_and_without_further_fields(
    text: str, score: float | None, kind: int | None, more: bytes
) -> None:
    """Whatever follows what SentencePiece writes: a later score replaces the first."""
    (found,) = parse_model(field(1, piece(text, score, kind) + more)).pieces
    scored = 1.0 if more.startswith(b"\x15") else score or 0.0
    assert found == Piece(text, scored, kind or NORMAL)


def test_text_that_is_not_utf_8_is_refused() -> None:
    model = field(1, field(1, b"\xff\xfe") + b"\x15\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"tokenizer.model is damaged: .* is not UTF-8"):
        parse_model(model)


def plain_merges(scores, ids):
    """One piece after the other, cut at every place."""
    ranked = []
    for piece, score in scores.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        cuts = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        ranked += [(score, cut) for cut in sorted(cuts, key=lambda cut: ids[cut[0]])]
    ranked.sort(key=lambda entry: entry[0], reverse=True)
    return [cut for _, cut in ranked]


@pytest.mark.slow
@given(
    st.dictionaries(TEXTS, st.sampled_from([-2.0, -1.0, 0.0]) | st.floats(-9, 9), max_size=40),
    st.lists(TEXTS, max_size=9),
    st.randoms(),
)
@example({}, [], None)
@example({"": 0.0}, [], None)
def test_merges_are_those_of_one_sorted_list_of_cuts(scores, more, order):
    known = list(dict.fromkeys([*scores, *more]))
    if order is not None:
        order.shuffle(known)
    ids = {text: number for number, text in enumerate(known)}
    assert merges(scores, ids) == plain_merges(scores, ids)


def test_merges_of_one_piece_go_by_the_id_of_the_first_half():
    scores = {"a": -3.0, "b": -2.0, "ab": -1.0, "ba": -1.0, "aba": 0.0}
    ids = {text: number for number, text in enumerate(["ab", "a", "b", "ba", "aba"])}
    assert merges(scores, ids) == [("ab", "a"), ("a", "ba"), ("a", "b"), ("b", "a")]
