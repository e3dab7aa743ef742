"""What every tokenizer promises, whatever made it."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.errors import CheckpointError, MissingFileError, PromptError
from lapilli.prompt.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer
from lapilli.prompt.tokenizer.fast import FastTokenizer
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer

EXAMPLES = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SPECIAL = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<0x41>"]
PIECES = ["a", " b", "  ", "\n", "é", "你好", "🙂", "▁", "\t", "x y", "'s", "."]
texts = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)
typed_texts = st.lists(st.sampled_from(PIECES + SPECIAL), max_size=10).map("".join)


def marks_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a space is written before the first word, as SentencePiece and Llama do."""
    return tokenizer.token_to_id("▁") is not None


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


@EXAMPLES
@given(text=st.text(max_size=20))
def test_text_survives_byte_fallback(text: str, tokenizer: Tokenizer) -> None:
    import unicodedata

    text = text.replace("▁", " ")
    if isinstance(tokenizer, FastTokenizer) and not marks_spaces(tokenizer):
        text = unicodedata.normalize("NFC", text)  # what NeoX does first
    ids = tokenizer.encode(text, literal=[(0, len(text))], add_bos=False)
    found = text_of(tokenizer, ids)
    assert found.removeprefix(" " * marks_spaces(tokenizer)) == text


@EXAMPLES
@given(text=typed_texts)
def test_typed_special_tokens_stay_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, literal=[(0, len(text))], add_bos=False)
    assert not set(ids) & tokenizer.special_ids
    found = text_of(tokenizer, ids).removeprefix(" " * marks_spaces(tokenizer))
    assert found == text.replace("▁", " " if marks_spaces(tokenizer) else "▁")


@EXAMPLES
@given(text=texts)
def test_literal_ranges_change_nothing_where_nothing_special_is_typed(
    text: str, tokenizer: Tokenizer
) -> None:
    assert tokenizer.encode(text, literal=[(0, len(text))]) == tokenizer.encode(text)


@pytest.mark.slow
@EXAMPLES
@given(before=texts, text=typed_texts, after=texts)
def test_special_tokens_around_a_literal_range_are_still_special(
    before: str, text: str, after: str, tokenizer: Tokenizer
) -> None:
    eos = tokenizer.id_to_token(tokenizer.eos_id or 0)
    whole = f"{before}{eos}{text}{eos}{after}"
    start = len(before) + len(eos)
    tokens = tokenizer.tokenize(whole, literal=[(start, start + len(text))])
    ends = [t for t in tokens if t.id == tokenizer.eos_id]
    assert [(t.start, t.end) for t in ends] == [
        (len(before), start),
        (start + len(text), start + len(text) + len(eos)),
    ]


@EXAMPLES
@given(text=typed_texts)
def test_tokens_say_which_characters_they_stand_for(text: str, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.tokenize(text, literal=[(0, len(text))])
    assert [t.id for t in tokens] == tokenizer.encode(text, literal=[(0, len(text))], add_bos=False)
    assert all(0 <= t.start <= t.end <= len(text) for t in tokens)
    starts = [t.start for t in tokens]
    assert starts == sorted(starts)
    covered = {i for t in tokens for i in range(t.start, t.end)}
    assert covered >= {i for i, c in enumerate(text) if not c.isspace() and c != "▁"}


@EXAMPLES
@given(text=texts)
def test_bytes_of_tokens_are_the_decoded_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, add_bos=False)
    joined = text_of(tokenizer, ids)
    if marks_spaces(tokenizer):
        joined = joined.removeprefix(" ")
    decoded = tokenizer.decode(ids)
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.legacy:
        decoded, joined = decoded.strip(" "), joined.strip(" ")
    if not marks_spaces(tokenizer):
        return  # NeoX cleans spaces before punctuation; its decoding is a golden case
    assert decoded == joined


def test_the_vocabulary_grows_by_new_tokens_only(fresh_tokenizer: Tokenizer) -> None:
    tokenizer = fresh_tokenizer
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(["<im_patch>", "<im_start>"], special=True) == 2
    assert tokenizer.add_tokens(["<im_patch>", "<other>"], special=False) == 1
    assert tokenizer.vocab_size == size + 3
    patch, other = tokenizer.token_to_id("<im_patch>"), tokenizer.token_to_id("<other>")
    assert (patch, other) == (size, size + 2)
    assert tokenizer.added_vocab["<other>"] == other
    assert patch in tokenizer.special_ids
    assert other not in tokenizer.special_ids
    assert tokenizer.encode("<im_patch>", add_bos=False) == [patch]
    assert tokenizer.token_bytes(size) == b"<im_patch>"
    assert patch not in tokenizer.encode("<im_patch>", literal=[(0, 10)], add_bos=False)


def test_ids_outside_the_vocabulary_are_named(tokenizer: Tokenizer) -> None:
    for index in (-200, tokenizer.vocab_size):
        with pytest.raises(PromptError, match=f"token id {index} is outside the vocabulary of"):
            tokenizer.id_to_token(index)
    assert tokenizer.token_to_id("no such token") is None


def test_what_is_written_around_a_text_is_bos_or_nothing(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.suffix_ids == ()
    assert tokenizer.bos_id is not None
    assert list(tokenizer.prefix_ids) in ([], [tokenizer.bos_id])


def test_configured_prefix_and_suffix(goldens: Any) -> None:
    for fast in (False, True):
        config = {"add_bos_token": False, "add_eos_token": True, "model_max_length": 10**30}
        files = TokenizerFiles(model=goldens.spm, config=config)
        tokenizer = build_tokenizer(files, fast=fast)
        assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((), (2,))
        assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=False)
        assert tokenizer.model_max_length is None
        assert tokenizer.pad_id is None
        assert tokenizer.padding_side == ("left" if fast else "right")


def test_added_tokens_by_id_come_before_the_special_map(goldens: Any) -> None:
    listed = {
        "0": {"content": "<unk>", "special": True, "normalized": False},
        "1000": {"content": "<im>", "special": False, "lstrip": True, "rstrip": True},
    }
    files = TokenizerFiles(
        model=goldens.spm,
        config={"added_tokens_decoder": listed, "legacy": True, "pad_token": "<pad>"},
        special_map={"pad_token": "<ignored>"},
    )
    tokenizer = build_tokenizer(files, fast=False)
    assert tokenizer.token_to_id("<im>") == 1000
    assert tokenizer.pad_id == tokenizer.token_to_id("<pad>") == 1001
    assert tokenizer.token_to_id("<ignored>") is None
    spaced = tokenizer.encode("a  <im>  b", add_bos=False)
    assert spaced == [*tokenizer.encode("a", add_bos=False), 1000, *tokenizer.encode("b")[1:]]


def test_a_single_word_token_is_not_found_inside_a_word(goldens: Any) -> None:
    listed = {"1000": {"content": "boat", "single_word": True}}
    files = TokenizerFiles(model=goldens.spm, config={"added_tokens_decoder": listed})
    tokenizer = build_tokenizer(files, fast=False)
    assert 1000 in tokenizer.encode("a boat here")
    assert 1000 not in tokenizer.encode("a boats here")


def test_the_files_that_are_there_decide_which_tokenizer_is_built(goldens: Any) -> None:
    both = TokenizerFiles(model=goldens.spm, json=goldens.neox)
    assert isinstance(build_tokenizer(both, fast=False), SentencePieceTokenizer)
    assert build_tokenizer(both, fast=True).vocab_size == 902
    only_json = TokenizerFiles(json=goldens.neox)
    assert isinstance(build_tokenizer(only_json, fast=False), FastTokenizer)
    with pytest.raises(MissingFileError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        build_tokenizer(TokenizerFiles(), fast=True)


@pytest.mark.parametrize("fast", [False, True])
def test_a_damaged_model_is_refused(goldens: Any, fast: bool) -> None:
    for damaged in (b"", b"version https://git-lfs.github.com/spec/v1\n", goldens.spm[:5000]):
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            build_tokenizer(TokenizerFiles(model=damaged), fast=fast)


@pytest.mark.parametrize("source", ["", "{}", "no json", '{"model": {"type": "BPE"}}'])
def test_a_damaged_json_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json .* cannot be read"):
        build_tokenizer(TokenizerFiles(json=source), fast=True)


def test_a_special_token_must_be_text(goldens: Any) -> None:
    files = TokenizerFiles(model=goldens.spm, config={"bos_token": 7})
    with pytest.raises(CheckpointError, match="special token 7: expected a string or an object"):
        build_tokenizer(files, fast=False)


def test_only_bpe_becomes_a_fast_tokenizer(goldens: Any) -> None:
    import io

    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a boat on a river", "the red house"] * 20),
        model_writer=file,
        vocab_size=40,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    files = TokenizerFiles(model=file.getvalue())
    with pytest.raises(CheckpointError, match=r"algorithm 1, expected BPE \(2\)"):
        build_tokenizer(files, fast=True)
    slow = build_tokenizer(files, fast=False)
    assert slow.decode(slow.encode("a red boat")) == "a red boat"
    assert json.loads(json.dumps(slow.tokenize("a zebra")))  # unknown letters have offsets too


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2048, 2048), (2048.0, 2048), (1e30, None), (float("nan"), None), (float("-inf"), None)],
)
def test_a_length_limit_beyond_a_billion_is_none(value, expected):
    from lapilli.prompt.tokenizer import length_limit

    assert length_limit(value) == expected
