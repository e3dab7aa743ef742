"""Every golden tokenizer case of the original, id by id."""

from typing import Any

import pytest

from lapilli.prompt.encode import encode
from lapilli.prompt.template import MediaSlot, Segment, TextSegment
from lapilli.prompt.tokenizer import Tokenizer

IMAGE_TOKEN_INDEX = -200


def around_images(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of raw text with a slot for every <image>, and -200 where the slot is."""
    segments: list[Segment] = []
    for i, piece in enumerate(text.split("<image>")):
        segments += [MediaSlot(), TextSegment(piece)] if i else [TextSegment(piece)]
    prompt = encode(segments, tokenizer, [1] * text.count("<image>"))
    ids = list(prompt.input_ids)
    for span in prompt.spans:
        ids[span.start] = IMAGE_TOKEN_INDEX
    return ids


def grown(goldens: Any, given: dict[str, Any]) -> Tokenizer:
    return goldens.tokenizer(given["tokenizer"], given.get("add_tokens", []))


@pytest.mark.slow
def test_ids_tokens_and_text_equal_the_original(goldens: Any) -> None:
    compared = 0
    for case in goldens.cases("_tokenizer", "tokenize"):
        tokenizer, expect = grown(goldens, case["input"]), case["expect"]
        assert tokenizer.vocab_size == expect["length"], case["id"]
        for i, text in enumerate(case["input"]["texts"]):
            ids = tokenizer.encode(text)
            assert ids == expect["plain"][i], (case["id"], text)
            assert [tokenizer.id_to_token(j) for j in ids] == expect["tokens"][i]
            assert tokenizer.decode(ids, skip_special=False) == expect["decode"][i]
            assert tokenizer.decode(ids) == expect["decode_skip_special"][i]
            compared += 1
    assert compared > 400


@pytest.mark.slow
def test_text_around_images_equals_the_original(goldens: Any) -> None:
    compared = 0
    for case in goldens.cases("_tokenizer", "tokenize"):
        tokenizer = grown(goldens, case["input"])
        for text, expected in zip(
            case["input"]["texts"], case["expect"]["image_token"], strict=True
        ):
            if text.startswith(("<s>", "<|endoftext|>")):
                continue  # encode() writes no second BOS behind one of the template
            assert around_images(text, tokenizer) == expected, (case["id"], text)
            compared += 1
    assert compared > 400


def test_decoding_random_ids_equals_the_original(goldens: Any) -> None:
    compared = 0
    for case in goldens.cases("_tokenizer", "decode"):
        tokenizer = goldens.tokenizer(case["input"]["tokenizer"])
        for i, ids in enumerate(case["input"]["ids"]):
            assert tokenizer.decode(ids, skip_special=False) == case["expect"]["text"][i]
            assert tokenizer.decode(ids) == case["expect"]["text_skip"][i]
            compared += 1
    assert compared > 150


def test_properties_equal_the_original(goldens: Any) -> None:
    compared = 0
    for name, spec in goldens.specs():
        (case,) = goldens.cases(name, "load")
        expect, tokenizer = case["expect"], goldens.of_model(spec)
        assert tokenizer.vocab_size == expect["len_tokenizer"], name
        special = expect["tokenizer_special"]
        assert tokenizer.bos_id == special["bos_token_id"]
        assert tokenizer.eos_id == special["eos_token_id"]
        assert tokenizer.pad_id == special["pad_token_id"]
        assert tokenizer.unk_id == special["unk_token_id"]
        assert tokenizer.padding_side == expect["tokenizer_padding_side"]
        assert tokenizer.model_max_length == expect["tokenizer_model_max_length"]
        compared += 1
    assert compared >= 10
