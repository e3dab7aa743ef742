"""Added tokens in what a person typed: ordinary ones as the libraries find them, special ones never.

The oracle is the `tokenizers` library itself, reading the same tokenizer.json in one call.
"""

import json
import re
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.generate.text import SettlingText
from lapilli.prompt.encode import encode
from lapilli.prompt.segments import TextSegment
from lapilli.prompt.tokenizer import FastTokenizer, SentencePieceTokenizer, Tokenizer
from tests.prompt.tokenizer.test_oracle import llama_json

EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=texts, on=all_flags)
def test_ordinary_tokens_are_found_in_typed_text(
    goldens: Any, kind: str, text: str, on: list[set[str]]
) -> None:
    """Beside special tokens of the template and without any, whatever the flags."""
    text = without_clashes(text, on)
    raw = json.dumps(source(goldens, kind, on))
    ours, theirs = FastTokenizer(raw), tokenizers.Tokenizer.from_str(raw)
    end = "</s>"
    for before, after in (("", ""), (end, end), ("a" + end, "\n")):
        whole = f"{before}{text}{after}"
        literal = [(len(before), len(before) + len(text))]
        expected = theirs.encode(whole, add_special_tokens=False).ids
        assert ours.encode(whole, literal=literal, add_bos=False) == expected
        cut = ours._tokenize_typed(whole, literal)  # where something special is typed elsewhere
        assert [token.id for token in cut] == expected


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(text=typed_texts, on=all_flags)
def test_special_tokens_are_text_where_they_are_typed(
    goldens: Any, kind: str, text: str, on: list[set[str]]
) -> None:
    text = without_clashes(text, on)
    raw = json.dumps(source(goldens, kind, on))
    ours, theirs = FastTokenizer(raw), tokenizers.Tokenizer.from_str(raw)
    ids = ours.encode(text, literal=[(0, len(text))], add_bos=False)
    assert not ours.special_ids & set(ids)
    theirs.encode_special_tokens = True
    expected = theirs.encode(text, add_special_tokens=False).ids
    if not ours.special_ids & set(expected):  # the model can put one together from its letters
        assert ids == expected
