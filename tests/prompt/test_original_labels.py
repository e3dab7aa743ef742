"""The labels of the original, its mistakes included: every golden case."""

from typing import Any

import pytest

from lapilli.errors import PromptError
from lapilli.prompt.original_labels import image_token_ids, original_sample, show_images_first
from lapilli.prompt.template import TEMPLATES


@pytest.mark.slow
def test_ids_labels_and_mismatches_equal_the_original(goldens: Any) -> None:
    compared = refused = 0
    for case in goldens.cases("_labels", "labels"):
        given, expect = case["input"], case["expect"]
        template = TEMPLATES[given["version"]]
        start_end = given.get("im_start_end", False)
        grow = [["<im_patch>", "<im_start>", "<im_end>"]] if start_end else []
        tokenizer = goldens.tokenizer(given["tokenizer"], grow)
        turns = [(turn["from"], turn["value"]) for turn in given["conversation"]]
        if given["has_image"]:
            turns = [
                (speaker, show_images_first(text, template.version, use_start_end=start_end))
                for speaker, text in turns
            ]
        options = {
            "has_image": given["has_image"],
            "max_length": given["tokenizer"].get("model_max_length", 2048),
            "pad_id": tokenizer.unk_id,
        }
        if "exception" in expect:
            with pytest.raises(PromptError):
                original_sample(turns, template, tokenizer, **options)
            refused += 1
            continue
        sample = original_sample(turns, template, tokenizer, **options)
        assert [text for _, text in turns] == expect["values_after_multimodal"], case["id"]
        assert sample.input_ids == expect["input_ids"], case["id"]
        assert sample.labels == expect["labels"], case["id"]
        counted = sample.mismatch and f"{sample.mismatch[0]} vs. {sample.mismatch[1]}."
        assert counted == expect["mismatch"], case["id"]
        compared += 1
    assert compared >= 150
    assert refused >= 5


@pytest.mark.slow
def test_image_token_ids_of_raw_text_equal_the_original(goldens: Any) -> None:
    compared = 0
    for case in goldens.cases("_tokenizer", "tokenize"):
        given = case["input"]
        tokenizer = goldens.tokenizer(given["tokenizer"], given.get("add_tokens", []))
        for text, expected in zip(
            case["input"]["texts"], case["expect"]["image_token"], strict=True
        ):
            assert image_token_ids(text, tokenizer) == expected, (case["id"], text)
            compared += 1
    assert compared > 400


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("human", "a"), ("tool", "b")], "from 'tool': expected human or gpt"),
        ([("human", "a"), ("human", "b")], "turn 1 is from human"),
    ],
)
def test_records_that_the_original_refuses(
    goldens: Any, turns: list[tuple[str, str]], expected: str
) -> None:
    with pytest.raises(PromptError, match=expected):
        original_sample(turns, TEMPLATES["v1"], goldens.tokenizer({}), has_image=False)


def test_plain_needs_a_picture_and_a_caption(goldens: Any) -> None:
    with pytest.raises(PromptError, match="one human turn with <image> and one caption, found 1"):
        original_sample([("human", "a")], TEMPLATES["plain"], goldens.tokenizer({}), has_image=True)
