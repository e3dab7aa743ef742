"""Added tokens in what a person typed: ordinary ones as the library finds them, special ones never.

The oracle is the `tokenizers` library itself, reading the same tokenizer.json in one call.
"""

import json
import re
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.prompt.encode import encode
from lapilli.prompt.template import TextSegment
from lapilli.prompt.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer
from lapilli.prompt.tokenizer.fast import FastTokenizer
from tests.prompt.tokenizer.test_fast import llama_json

EXAMPLES = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
ORDINARY = ("<loc1>", "  ", "   ", "boat", "é", "<loc12>", "c>x")
SPECIAL = ("</s>", "<sep>")
KINDS = ("prepend", "first", "always", "never", "neox")
PIECES = (*ORDINARY, " ", "a", "boats", "\n", "<", "x>", "loc1>", "你", "▁", ".")
texts = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
typed_texts = st.lists(st.sampled_from(PIECES + SPECIAL), max_size=9).map("".join)
all_flags = st.lists(
    st.sets(st.sampled_from(FLAGS)), min_size=len(ORDINARY), max_size=len(ORDINARY)
)


def without_clashes(text: str, on: list[set[str]]) -> str:
    """A text in which no token swallows the spaces of another: the library panics there."""
    swallows = any({"lstrip", "rstrip"} & flags for flags in on)
    return re.sub(" +", " ", text) if swallows or "<sep>" in text else text


def source(goldens: Any, kind: str, given_flags: list[set[str]]) -> dict[str, Any]:
    """A tokenizer.json with ordinary tokens of these flags behind its special ones."""
    raw = json.loads(goldens.neox) if kind == "neox" else llama_json(goldens.spm, kind)
    known = {token["content"] for token in raw["added_tokens"]} | set(raw["model"]["vocab"])
    number = max(max(t["id"] for t in raw["added_tokens"]) + 1, len(raw["model"]["vocab"]))
    new = [(name, set(), True) for name in SPECIAL if name not in known]
    new += [(name, on, False) for name, on in zip(ORDINARY, given_flags, strict=True)]
    for name, on, special in new:
        index = raw["model"]["vocab"].get(name, number)
        number += index == number
        entry = {"id": index, "content": name, "special": special}
        raw["added_tokens"].append(entry | {flag: flag in on for flag in FLAGS})
    raw["added_tokens"].sort(key=lambda token: token["id"])
    return raw


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=texts, on=all_flags)
def test_ordinary_tokens_are_found_in_typed_text(
    goldens: Any, kind: str, text: str, on: list[set[str]]
) -> None:
    """Beside special tokens of the template and without any, whatever the flags."""
    text = without_clashes(text, on)
    raw = json.dumps(source(goldens, kind, on))
    ours, theirs = FastTokenizer(TokenizerFiles(json=raw)), tokenizers.Tokenizer.from_str(raw)
    end = "</s>"
    for before, after in (("", ""), (end, end), ("a" + end, "\n")):
        whole = f"{before}{text}{after}"
        literal = [(len(before), len(before) + len(text))]
        expected = theirs.encode(whole, add_special_tokens=False).ids
        assert ours.encode(whole, literal=literal, add_bos=False) == expected
        cut = ours._tokenize_typed(whole, literal)  # where something special is typed elsewhere
        assert [token.id for token in cut] == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=typed_texts, on=all_flags)
def test_special_tokens_are_text_where_they_are_typed(
    goldens: Any, kind: str, text: str, on: list[set[str]]
) -> None:
    text = without_clashes(text, on)
    raw = json.dumps(source(goldens, kind, on))
    ours, theirs = FastTokenizer(TokenizerFiles(json=raw)), tokenizers.Tokenizer.from_str(raw)
    ids = ours.encode(text, literal=[(0, len(text))], add_bos=False)
    assert not ours.special_ids & set(ids)
    theirs.encode_special_tokens = True
    expected = theirs.encode(text, add_special_tokens=False).ids
    if not ours.special_ids & set(expected):  # the model can put one together from its letters
        assert ids == expected


def llama(goldens: Any, fast: bool, *, legacy: bool = True) -> Tokenizer:
    """A tokenizer.model with an ordinary token and two special ones, one a part of the other."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    listed = {"1000": {"content": "<loc1>", "special": False, **flags}}
    config = {"added_tokens_decoder": listed, "legacy": legacy}
    tokenizer = build_tokenizer(TokenizerFiles(model=goldens.spm, config=config), fast=fast)
    tokenizer.add_tokens(["<a>", "<a>b"], special=True)
    return tokenizer


@pytest.mark.parametrize(("fast", "legacy"), [(False, True), (False, False), (True, True)])
def test_special_and_ordinary_added_tokens_in_a_conversation(
    goldens: Any, fast: bool, legacy: bool
) -> None:
    tokenizer = llama(goldens, fast, legacy=legacy)
    segments = [
        TextSegment("<a>"),  # the template's, though a person goes on with the rest of "<a>b"
        TextSegment("b at <loc1><a>", literal=True),
        TextSegment("<a>b"),
        TextSegment("<loc1> </s>", literal=True, trainable=True),
        TextSegment("</s>", trainable=True),
    ]
    encoded = encode(segments, tokenizer, [])
    kinds = [i for i in encoded.input_ids if i in (2, 1000, 1001, 1002)]
    assert kinds == [1001, 1000, 1002, 1000, 2]
    assert encoded.loss_mask[-1]
    text = "".join(segment.text for segment in segments)
    assert "<loc1>" in tokenizer.decode(encoded.input_ids)
    ordinary = text.replace("<a>b", "").replace("<a>", "").replace("</s>", "")
    whole = tokenizer.encode(ordinary, literal=[(0, len(ordinary))])
    assert whole == tokenizer.encode(ordinary)


@pytest.mark.parametrize("fast", [False, True])
def test_tokens_that_become_special_later_stay_text_when_typed(goldens: Any, fast: bool) -> None:
    """As <im_start> of a checkpoint whose added_tokens.json only lists its id."""
    added = {"<im_start>": 1000, "<loc1>": 1001}
    tokenizer = build_tokenizer(TokenizerFiles(model=goldens.spm, added=added), fast=fast)
    assert tokenizer.add_tokens(["<im_start>"], special=True) == 0
    typed = "<im_start> <loc1>"
    ids = tokenizer.encode(typed, literal=[(0, len(typed))])
    assert 1000 not in ids
    assert 1001 in ids
    assert tokenizer.encode(typed).count(1000) == 1


def test_a_single_word_token_touches_no_letter_or_digit(goldens: Any) -> None:
    """Beside punctuation too, where a slow tokenizer wants a space."""
    raw = source(goldens, "never", [set()] * 3 + [{"single_word"}] + [set()] * 3)
    raw["added_tokens"][-4]["special"] = True
    ours = FastTokenizer(TokenizerFiles(json=json.dumps(raw)))
    boat = ours.token_to_id("boat")
    for text, count in (("a boat.", 1), ("boats", 0), ("(boat)", 1), ("xboat", 0)):
        assert ours.encode(text).count(boat) == count, text
        typed = f"{text}</s>"
        ids = ours.encode(typed, literal=[(len(text), len(typed))])
        assert ids.count(boat) == count, text
