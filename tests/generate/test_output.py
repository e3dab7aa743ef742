"""Incremental text equals `decode` of every kind of tokenizer; stop strings are cut off."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.generate.output import IncrementalDetokenizer, StopStrings
from lapilli.prompt.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer

KINDS = ["slow", "slow, not legacy", "fast", "byte level"]
REPLACEMENT = "\ufffd"
TEXTS = [
    "The quick brown fox, a bridge and the moon.",
    "  two spaces, and\n\na line",
    "日本語とемодзи 🌋👩‍👩‍👧 é é",
    "",
    "🪨",
]


@pytest.fixture(scope="module")
def tokenizers(conformance) -> dict[str, Tokenizer]:
    assets = conformance / "assets" / "open"
    model = (assets / "tokenizer.model").read_bytes()
    neox = (assets / "neox_tokenizer.json").read_text()
    return {
        "slow": build_tokenizer(TokenizerFiles(model=model), fast=False),
        "slow, not legacy": build_tokenizer(
            TokenizerFiles(model=model, config={"legacy": False}), fast=False
        ),
        "fast": build_tokenizer(TokenizerFiles(model=model), fast=True),
        "byte level": build_tokenizer(
            TokenizerFiles(json=neox, config={"tokenizer_class": "GPTNeoXTokenizer"}), fast=True
        ),
    }


def settle(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    text = IncrementalDetokenizer(tokenizer)
    return [*(text.push(token_id) for token_id in ids), text.flush()]


def same_text(ours: str, theirs: str) -> bool:
    """Equal but for how many replacement characters stand for bytes that are no text."""

    def shrink(text: str) -> str:
        while REPLACEMENT * 2 in text:
            text = text.replace(REPLACEMENT * 2, REPLACEMENT)
        return text

    return shrink(ours) == shrink(theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_real_text_are_its_decoding(tokenizers, kind: str, text: str):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_bos=False)
    pieces = settle(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert pieces[-1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_any_text_are_its_decoding(tokenizers, kind: str, data: st.DataObject):
    text = data.draw(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_bos=False, literal=[(0, len(text))])
    assert "".join(settle(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_are_their_decoding(tokenizers, kind: str, data: st.DataObject):
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    pieces = settle(tokenizer, ids)
    whole = "".join(pieces)
    if kind != "fast":
        assert same_text(whole, tokenizer.decode(ids))
    # Every prefix of the answer has the same pieces: nothing is ever taken back.
    for end in range(len(ids)):
        assert settle(tokenizer, ids[:end])[:-1] == pieces[:end]


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_is_never_split(tokenizers, kind: str):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("a 🌋 b", add_bos=False)
    text = IncrementalDetokenizer(tokenizer)
    pieces = [text.push(token_id) for token_id in ids]
    assert "🌋" in "".join(pieces)
    assert any("🌋" in piece for piece in pieces)  # whole, in one piece
    assert "" in pieces  # held back until its last byte


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_character_ends_as_a_replacement(tokenizers, kind: str):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("a 🌋", add_bos=False)[:-1]
    *pieces, last = settle(tokenizer, ids)
    assert "".join(pieces).rstrip() == "a"
    assert last == REPLACEMENT


@pytest.mark.parametrize("kind", ["slow", "fast"])
def test_only_the_first_word_loses_its_space(tokenizers, kind: str):
    tokenizer = tokenizers[kind]
    word = tokenizer.encode("moon", add_bos=False)
    assert "".join(settle(tokenizer, [*word, *word])) == "moon moon"
    assert "".join(settle(tokenizer, [tokenizer.bos_id, *word, tokenizer.eos_id])) == "moon"


def test_tokens_without_text_are_silent(tokenizers):
    tokenizer = tokenizers["byte level"]
    special = sorted(tokenizer.special_ids)
    assert special
    beyond = tokenizer.vocab_size + 7
    assert settle(tokenizer, [*special, beyond]) == [""] * (len(special) + 2)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_with_added_tokens_are_their_decoding(tokenizers, kind: str, data: st.DataObject):
    """Ordinary added tokens are text; the slow tokenizers set them off by spaces."""
    tokenizer = grown(tokenizers[kind])
    words = ["a", " b", " ", "  ", "<loc1>", "\n", "<loc2>", "c", "é"]
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=8)))
    ids = tokenizer.encode(text, add_bos=False)
    settled = "".join(settle(tokenizer, ids))
    assert settled == tokenizer.decode(ids)


def grown(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer = copy.copy(tokenizer)
    tokenizer.add_tokens(["<loc1>", "<loc2>"], special=False)
    return tokenizer


texts = st.text(alphabet="ab#", max_size=12)
stops = st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), min_size=1, max_size=3)


def run(pieces: list[str], stop_strings: list[str]) -> tuple[list[str], str | None]:
    strings = StopStrings(stop_strings)
    shown = [strings.push(piece) for piece in pieces]
    if strings.found is None:
        shown.append(strings.flush())
    return shown, strings.found


def test_the_beginning_of_a_stop_string_is_held_back():
    strings = StopStrings(["###", "</s>"])
    assert strings.push("one #") == "one "
    assert strings.push("#") == ""
    assert strings.push("two") == "##two"
    assert strings.push(" <") == " "
    assert strings.push("/s") == ""
    assert strings.push("> three") == ""
    assert strings.found == "</s>"
    assert strings.push("four") == ""


def test_flush_returns_what_never_became_a_stop_string():
    strings = StopStrings(["</s>"])
    assert strings.push("a </") == "a "
    assert strings.flush() == "</"
    assert strings.flush() == ""


@pytest.mark.parametrize(
    ("text", "stop_strings", "shown", "found"),
    [
        ("aab", ["ab"], "a", "ab"),  # the first a is held, then let go
        ("xaba", ["aba", "ab"], "x", "ab"),  # the one that ends first
        ("xabc", ["bc", "abc"], "x", "abc"),  # both end together: the longest
        ("abab#", ["ab#"], "ab", "ab#"),  # overlapping beginnings
        ("", ["a"], "", None),
    ],
)
def test_the_stop_string_that_ends_first_counts(text, stop_strings, shown, found):
    for pieces in (list(text), [text]):
        got, which = run(pieces, stop_strings)
        assert ("".join(got), which) == (shown, found)


@given(st.lists(texts, max_size=6), stops)
def test_the_result_does_not_depend_on_the_pieces(pieces: list[str], stop_strings: list[str]):
    text = "".join(pieces)
    shown, found = run(pieces, stop_strings)
    one_by_one, same = run(list(text), stop_strings)
    assert ("".join(shown), found) == ("".join(one_by_one), same)
    if found is None:
        assert "".join(shown) == text
        assert not any(stop in text for stop in stop_strings)
    else:
        assert text.startswith("".join(shown) + found)
        assert not any(stop in "".join(shown) for stop in stop_strings)


@given(texts, stops)
def test_no_part_of_a_stop_string_is_shown(text: str, stop_strings: list[str]):
    shown, found = run(list(text), stop_strings)
    ends = [text.find(s) + len(s) for s in stop_strings if s in text]
    if found is None:
        assert not ends
    else:
        assert len("".join(shown)) + len(found) == min(ends)


def test_without_stop_strings_nothing_is_held():
    strings = StopStrings([])
    assert strings.push("any") == "any"
    assert strings.flush() == ""
