"""Digests are hashlib's, compiled and in Python, for texts of any length."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.kernels import digest
from lapilli.kernels.digest import digests, plain_digests

TEXTS = st.lists(st.binary(max_size=40) | st.binary(min_size=100, max_size=600), max_size=20)


def expected(texts: list[bytes]) -> list[int]:
    made = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return [int.from_bytes(one, "little") for one in made]


@given(TEXTS)
def test_digests_are_blake2b(texts) -> None:
    assert digests(texts).tolist() == plain_digests(texts).tolist() == expected(texts)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 255, 256, 257, 1000])
def test_texts_that_end_with_a_block(size: int) -> None:
    texts = [bytes(range(256)) * 4] * 3 + [b"x" * size, b"", b"y" * (size + 1)]
    assert digests(texts).tolist() == expected(texts)


def test_without_a_library(monkeypatch) -> None:
    monkeypatch.setattr(digest, "native", lambda: None)
    texts = [b"a", b"b", b"", b"c" * 200, b"d", b"e"]
    assert digests(texts).tolist() == expected(texts)
