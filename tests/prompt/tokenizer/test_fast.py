"""Tokenizers against the transformers library, where both read the same file.

Its LlamaTokenizer (since 5.0) no longer follows the normalizer of a tokenizer.json but builds its
own from the flag `legacy`; ours follows the file, as 4.x did when the checkpoints were made.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from lapilli.prompt.tokenizer import TokenizerFiles
from lapilli.prompt.tokenizer.fast import FastTokenizer, llama_tokenizer
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer

TEXTS = (
    *("", " ", "  a", "Hello  world ", "\n\n", "a \n b", "<s>", "a</s>b", "</s></s>", "x<unk> y"),
    *("USER: <image>\nHi", "é 你好 🙂", "<|im_start|>user\nHi<|im_end|>", "it 's , ok .", "▁"),
    *("<sep>a", "a <sep> b", "<sep>  <sep>", "<image><image>"),
)
BOS = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
POST = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": BOS,
}


def llama_json(model: bytes, kind: str) -> dict[str, Any]:
    """A tokenizer.json in one of the three ways in which spaces are marked."""
    raw: dict[str, Any] = json.loads(llama_tokenizer(model).to_str())
    raw["post_processor"] = POST
    if kind != "prepend":
        raw["normalizer"] = None
        raw["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": kind,
            "split": False,
        }
    raw["added_tokens"].append(
        {
            "id": len(raw["model"]["vocab"]),
            "content": "<sep>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": True,
            "normalized": False,
        }
    )
    return raw


def from_json(raw: dict[str, Any], config: dict[str, object] | None = None) -> FastTokenizer:
    return FastTokenizer(TokenizerFiles(json=json.dumps(raw), config=config or {}))


def compare(directory: Path, source: str, config: dict[str, object]) -> None:
    (directory / "tokenizer.json").write_text(source, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = FastTokenizer(TokenizerFiles(json=source, config=config))
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "never"])
def test_any_tokenizer_json(goldens: Any, tmp_path: Path, kind: str) -> None:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    compare(tmp_path, json.dumps(llama_json(goldens.spm, kind)), config)


@pytest.mark.parametrize(("kind", "legacy"), [("first", False), ("always", True)])
def test_a_llama_tokenizer_json(goldens: Any, tmp_path: Path, kind: str, legacy: bool) -> None:
    config: dict[str, object] = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "clean_up_tokenization_spaces": False,
    }
    compare(tmp_path, json.dumps(llama_json(goldens.spm, kind)), config)


def test_a_byte_level_tokenizer_json(goldens: Any, tmp_path: Path) -> None:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|padding|>",
        "clean_up_tokenization_spaces": False,
    }
    compare(tmp_path, goldens.neox, config)


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "never"])
def test_a_typed_special_token_in_every_way_of_marking_spaces(goldens: Any, kind: str) -> None:
    config = {"tokenizer_class": "LlamaTokenizerFast"}
    tokenizer = from_json(llama_json(goldens.spm, kind), config)
    text = "</s>a <sep> b</s>c"
    literal = [(0, 4)]
    tokens = tokenizer.tokenize(text, literal=literal)
    assert [t.id for t in tokens].count(2) == 1
    tail = tokenizer.encode(text[4:], add_bos=False)[1:]
    assert [t.id for t in tokens][-len(tail) :] == tail


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "never"])
def test_text_cut_at_special_tokens_has_the_ids_of_one_call(goldens: Any, kind: str) -> None:
    config = {"tokenizer_class": "LlamaTokenizerFast"}
    tokenizer = from_json(llama_json(goldens.spm, kind), config)
    for text in TEXTS:
        cut = tokenizer._tokenize_typed(text, ())
        assert [t.id for t in cut] == tokenizer.encode(text, add_bos=False), text


def test_a_unigram_model_cannot_put_a_special_token_together() -> None:
    vocab = [["<unk>", 0.0], ["</s>", 0.0], *([c, -2.0] for c in "▁</s>a")]
    raw = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 1,
                "content": "</s>",
                "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False},
    }
    tokenizer = from_json(raw)
    assert tokenizer.encode("</s>a") == [1, 2, 7]
    assert tokenizer.encode("</s>a", literal=[(0, 4)]) == [2, 3, 4, 5, 6, 7]


def test_symbols_of_a_sentencepiece_model_stay_text_when_typed() -> None:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user a boat <| im | start >", "the red house _"] * 20),
        model_writer=file,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<|im_start|>"],
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(
        TokenizerFiles(model=file.getvalue(), config={"legacy": False})
    )
    symbol = tokenizer.token_to_id("<|im_start|>")
    text = "<|im_start|>user a <|im_start|> boat"
    assert tokenizer.encode(text).count(symbol) == 2
    typed = (19, 31)
    assert text[slice(*typed)] == "<|im_start|>"
    tokens = tokenizer.tokenize(text, literal=[typed])
    assert [(t.start, t.end) for t in tokens if t.id == symbol] == [(0, 12)]
    joined = b"".join(tokenizer.token_bytes(t.id) for t in tokens)
    assert joined.decode().removeprefix(" ") == text
