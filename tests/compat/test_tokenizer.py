from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lapilli.compat.tokenizer import PreTrainedTokenizer, inner_of
from lapilli.errors import MissingFileError
from tests.compat.conftest import MakeCheckpoint


@pytest.fixture
def tokenizer(make_checkpoint: MakeCheckpoint) -> PreTrainedTokenizer:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    return PreTrainedTokenizer.from_pretrained(path, use_fast=False)


def test_the_class_names_are_those_of_transformers(make_checkpoint: MakeCheckpoint) -> None:
    llama = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    mpt = make_checkpoint("llava-mpt-tiny")["model_path"]
    names = [
        type(PreTrainedTokenizer.from_pretrained(path, use_fast=fast)).__name__
        for path, fast in ((llama, False), (llama, True), (mpt, True))
    ]
    assert names == ["LlamaTokenizer", "LlamaTokenizerFast", "GPTNeoXTokenizerFast"]


def test_a_call_returns_ids_and_a_mask(tokenizer: PreTrainedTokenizer) -> None:
    encoded = tokenizer("A boat.")
    assert encoded.input_ids[0] == tokenizer.bos_token_id == 1
    assert encoded["attention_mask"] == [1] * len(encoded.input_ids)
    assert tokenizer("A boat.", return_tensors="pt").input_ids.shape == (1, len(encoded.input_ids))
    with pytest.raises(AttributeError):
        _ = encoded.token_type_ids


@pytest.mark.parametrize(("side", "at"), [("left", 0), ("right", -1)])
def test_rows_are_padded_on_their_side(tokenizer: PreTrainedTokenizer, side: str, at: int) -> None:
    tokenizer.padding_side = side
    tokenizer.pad_token = tokenizer.unk_token
    encoded = tokenizer(["A boat.", "A boat on the river."], padding=True, return_tensors="pt")
    assert encoded.input_ids[0, at] == 0
    assert encoded.attention_mask[0, at] == 0
    assert bool(encoded.attention_mask[1].all())


def test_ragged_rows_make_no_tensor(tokenizer: PreTrainedTokenizer) -> None:
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(["A boat.", "A boat on the river."], return_tensors="pt")


def test_padding_needs_a_pad_token(tokenizer: PreTrainedTokenizer) -> None:
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad"):
        tokenizer(["a", "a b c d"], padding=True)


def test_truncation_keeps_the_first_ids(tokenizer: PreTrainedTokenizer) -> None:
    full = tokenizer("A boat on the river.").input_ids
    assert tokenizer("A boat on the river.", truncation=True, max_length=4).input_ids == full[:4]


def test_decoding_takes_lists_tensors_and_single_ids(tokenizer: PreTrainedTokenizer) -> None:
    ids = tokenizer("A boat.").input_ids
    assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True).strip() == "A boat."
    rows = torch.tensor([ids, ids])
    assert tokenizer.batch_decode(rows) == [tokenizer.decode(ids)] * 2
    assert tokenizer.decode(2) == "</s>"


def test_tokens_and_ids_convert_both_ways(tokenizer: PreTrainedTokenizer) -> None:
    tokens = tokenizer.tokenize("A boat.")
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.convert_ids_to_tokens(2) == "</s>"
    assert tokenizer.convert_tokens_to_ids("no such token") == tokenizer.unk_token_id
    assert tokenizer.convert_tokens_to_string(tokens).strip() == "A boat."


def test_added_tokens_grow_the_vocabulary(tokenizer: PreTrainedTokenizer) -> None:
    before = len(tokenizer)
    assert tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True) == 2
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]"}) == 1
    assert len(tokenizer) == before + 3 == len(tokenizer.get_vocab())
    assert tokenizer.pad_token_id == before + 2
    assert tokenizer.vocab_size == before
    assert tokenizer.encode("a<im_start>b").count(before) == 1


def test_an_unknown_attribute_is_named(tokenizer: PreTrainedTokenizer) -> None:
    with pytest.raises(AttributeError, match="chat"):
        _ = tokenizer.chats


def test_tensors_special_tokens_and_padding(tokenizer: PreTrainedTokenizer) -> None:
    ids = tokenizer.encode("A boat.", return_tensors="pt")
    assert ids.shape == (1, len(tokenizer("A boat.").input_ids))
    assert tokenizer.special_tokens_map["eos_token"] == "</s>"
    padded = tokenizer.pad({"input_ids": [[1, 5], [1]]})
    assert [len(row) for row in padded["input_ids"]] == [2, 2]


def test_what_is_saved_gives_the_same_ids(tokenizer: PreTrainedTokenizer, tmp_path: Any) -> None:
    tokenizer.add_tokens(["<im_start>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizer.from_pretrained(tmp_path, use_fast=False)
    assert type(again) is type(tokenizer)
    text = "A boat <im_start> on the river."
    assert again(text).input_ids == tokenizer(text).input_ids
    assert len(again) == len(tokenizer)


@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize("text", ["  a  b ", " \nWhat?", "", "x </s>y", " </s> a"])
def test_auto_tokenizer_gives_the_ids_of_the_original(
    make_checkpoint: MakeCheckpoint, use_fast: bool, text: str
) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    ours = PreTrainedTokenizer.from_pretrained(path, use_fast=use_fast)
    found = AutoTokenizer.from_pretrained(path, use_fast=use_fast)
    assert type(found) is type(ours)
    assert found(text).input_ids == ours(text).input_ids
    assert found.name_or_path == path


def test_auto_tokenizer_takes_its_options(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    options = {"padding_side": "left", "model_max_length": 7, "pad_token": "<unk>"}
    found = AutoTokenizer.from_pretrained(path, use_fast=False, add_eos_token=True, **options)
    assert {name: getattr(found, name) for name in options} == options
    assert found("a").input_ids[-1] == found.eos_token_id


def test_other_tokenizers_stay_with_transformers(make_checkpoint: MakeCheckpoint) -> None:
    found = AutoTokenizer.from_pretrained(make_checkpoint("llava-mpt-tiny")["model_path"])
    assert not isinstance(found, PreTrainedTokenizer)
    assert inner_of(found).encode("A boat.") == found("A boat.").input_ids
    with pytest.raises(OSError, match="nowhere"):
        AutoTokenizer.from_pretrained("./nowhere")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Any) -> None:
    with pytest.raises(MissingFileError, match="no tokenizer in"):
        PreTrainedTokenizer.from_pretrained(tmp_path)
