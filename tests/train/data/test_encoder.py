"""Labels: the original's where it is right, and right where it drops a sample."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapilli.errors import DataError, PromptError
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.prompt.template import TEMPLATES
from lapilli.prompt.tokenizer import TokenizerFiles
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer
from lapilli.train.data import EncodedSample, SampleEncoder, open_dataset, to_sample
from lapilli.train.data.encoder import _check_supervised, cut
from lapilli.train.recipe import SourceRecipe
from pebble.words import corpus, train_tokenizer
from tests.prompt.test_encode import check_learned, is_right, with_sentinels
from tests.train.data.conftest import small_model, turns

# What the original learns is what it means to learn, with these alone.
RIGHT = {
    "llama_2", "llava_llama_2", "llava_v1", "mistral_instruct", "plain", "v1", "v1_mmtag",
}  # fmt: skip


def golden_sample(case):
    """The record of a golden case; the original has one picture or none."""
    record = {"id": case["id"], "conversations": case["input"]["conversation"]}
    if "<image>" in str(record):
        record["image"] = "x.png"
    return to_sample(record, where="golden.json:1")


def golden_row(case, goldens, model):
    """Ids and labels of a golden case, every picture being one position."""
    given = case["input"]
    template, grow = TEMPLATES[given["version"]], []
    if given.get("im_start_end"):
        template = replace(template, media_tokens=("<im_start>", "<im_end>"))
        grow = [["<im_patch>"], ["<im_start>", "<im_end>"]]
    tokenizer = goldens.tokenizer(given["tokenizer"], grow)
    sample = golden_sample(case)
    encoder = SampleEncoder(tokenizer, template, model)
    return encoder.encode_prompt(sample, [1] * len(sample.media)), sample, template, tokenizer


@pytest.mark.slow
def test_labels_equal_the_original_where_it_is_right(goldens, model):
    compared = Counter()
    for case in goldens.cases("_labels", "labels"):
        expect = case["expect"]
        if "exception" in expect or not is_right(case):
            continue
        prompt, *_ = golden_row(case, goldens, model)
        assert with_sentinels(prompt) == expect["input_ids"], case["id"]
        assert prompt.labels == expect["labels"], case["id"]
        compared[case["input"]["version"]] += 1
    assert compared.keys() == RIGHT
    assert min(compared.values()) >= 5
    assert compared.total() >= 60


@pytest.mark.slow
def test_answers_are_learned_where_the_original_learns_others(goldens, model):
    """mpt and chatml drift by a token a round, v0 learns parts of its roles, some rows are cut."""
    compared = Counter()
    for case in goldens.cases("_labels", "labels"):
        expect = case["expect"]
        if "exception" in expect or expect["mismatch"] or is_right(case):
            continue
        prompt, sample, template, tokenizer = golden_row(case, goldens, model)
        version, cut_at = case["input"]["version"], len(expect["input_ids"])
        if not version.startswith("v0"):  # trained on other text than it is asked with
            assert with_sentinels(prompt)[:cut_at] == expect["input_ids"], case["id"]
        check_learned(prompt, template.name, list(sample.messages), tokenizer)
        compared[version] += 1
    assert compared.keys() >= {"v0", "v0_mmtag", "mpt", "chatml_direct"}
    assert compared.total() >= 40


@pytest.mark.slow
def test_answers_are_learned_where_the_original_drops_the_sample(goldens, model):
    compared = 0
    for case in goldens.cases("_labels", "labels"):
        expect = case["expect"]
        if "exception" in expect or not expect["mismatch"]:
            continue
        prompt, sample, template, tokenizer = golden_row(case, goldens, model)
        assert with_sentinels(prompt) == expect["input_ids"], case["id"]
        check_learned(prompt, template.name, list(sample.messages), tokenizer)
        compared += 1
    assert compared >= 30


def test_what_the_original_refuses_is_refused(goldens, model):
    refused = 0
    for case in goldens.cases("_labels", "labels"):
        if "exception" in case["expect"]:
            with pytest.raises(PromptError, match="a plain template trains on"):
                golden_row(case, goldens, model)
            refused += 1
    assert refused >= 5


@pytest.mark.slow
def test_batches_of_the_original_dataset(goldens, conformance):
    """Ids and labels of whole records, pictures opened; the original's collator cuts afterwards."""
    compared, model = 0, small_model(vocab_size=60_000)  # a row for every token of any tokenizer
    for case in goldens.cases("_labels", "dataset"):
        given, expect = case["input"], case["expect"]
        tokenizer = goldens.tokenizer(given["tokenizer"])
        encoder = SampleEncoder(tokenizer, TEMPLATES[given["version"]], model)
        for place, number in enumerate(given["batch"]):
            one = given["records"][number]
            folder = conformance / "images" / "open"
            row = encoder.encode(to_sample(one, where=case["id"], resolve=folder.joinpath))
            ids, labels = collapsed(row)
            size = sum(expect["attention_mask"][place])
            expected = expect["labels"][place][:size]
            if size:  # pad is a token that mpt uses too
                assert ids[:size] == expect["input_ids"][place][:size], (case["id"], place)
            if any(label != -100 for label in expected):  # else dropped, or cut to nothing
                assert labels[:size] == expected, (case["id"], place)
                compared += 1
    assert compared >= 8


def collapsed(row):
    """Ids and labels with every span as the original's one sentinel."""
    spans = row.prompt.spans
    inside = {i for span in spans for i in range(span.start + 1, span.start + span.length)}
    kept = [i for i in range(len(row.prompt)) if i not in inside]
    ids, labels = with_sentinels(row.prompt), row.prompt.labels
    return [ids[i] for i in kept], [labels[i] for i in kept]


def test_word_counts_equal_the_original(goldens, tmp_path):
    compared = 0
    for case in goldens.cases("_labels", "dataset"):
        path = tmp_path / f"{case['id']}.json"
        path.write_text(json.dumps(case["input"]["records"]), encoding="utf-8")
        words = open_dataset([SourceRecipe(path=str(path))]).words()
        assert words.tolist() == case["expect"]["modality_lengths"], case["id"]
        compared += 1
    assert compared >= 7


def record(*texts, image=None):
    return {"id": "7", "conversations": turns(*texts)} | ({} if image is None else {"image": image})


def make(tokenizer, model, one, *, max_length=None, template="vicuna_v1", folder=Path()):
    encoder = SampleEncoder(tokenizer, TEMPLATES[template], model, max_length)
    return encoder.encode(to_sample(one, where="d.json:3", resolve=lambda name: folder / str(name)))


@pytest.mark.parametrize("texts", [("Q", ""), ("Q",), ("Q", "", "R", "")])
def test_a_sample_without_labels_is_an_error_with_its_id(tokenizer, model, texts):
    with pytest.raises(DataError, match=r"d.json:3 \(id '7'\): no supervised token: every answer"):
        make(tokenizer, model, record(*texts))


def test_a_sample_is_cut_in_its_text_and_counts_it(tokenizer, model):
    whole = make(tokenizer, model, record("Q", "A b c d e f g"))
    size = len(whole.prompt)
    short = make(tokenizer, model, record("Q", "A b c d e f g"), max_length=size - 2)
    assert short.cut == 2
    assert short.prompt.input_ids == whole.prompt.input_ids[:-2]
    assert short.prompt.loss_mask == whole.prompt.loss_mask[:-2]
    assert whole.cut == 0
    first = whole.prompt.loss_mask.index(True)
    with pytest.raises(DataError, match=rf"id '7'\): no supervised token is left of {size} pos"):
        make(tokenizer, model, record("Q", "A b c d e f g"), max_length=first)


def test_a_picture_is_never_cut_through(tokenizer, model, folder):
    one = record("<image>\nQ", "A", "<image>\nR", "B", image=["red.png", "blue.png"])
    whole = make(tokenizer, model, one, folder=folder)
    second = whole.prompt.spans[1]
    with pytest.raises(DataError, match=rf"id '7'.* cut through the image at .* {second.start} to"):
        make(tokenizer, model, one, folder=folder, max_length=second.start + 1)
    short = make(tokenizer, model, one, folder=folder, max_length=second.start)
    assert len(short.media) == len(short.prompt.spans) == 1
    same = make(tokenizer, model, one, folder=folder, max_length=second.start + second.length)
    assert len(same.media) == 2


SPANS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=4)


@given(SPANS, st.integers(0, 5), st.integers(1, 40))
def test_a_cut_prompt_is_its_beginning(gaps, tail, limit):
    spans, at = [], 0
    for gap, length in gaps:
        spans.append(Span(0, at + gap, length))
        at += gap + length
    prompt = EncodedPrompt(
        list(range(at + tail)), [i % 3 == 0 for i in range(at + tail)], tuple(spans)
    )
    inside = any(s.start < limit < s.start + s.length for s in spans)
    if inside and len(prompt) > limit:
        with pytest.raises(PromptError, match="cut through"):
            cut(prompt, limit)
        return
    kept = cut(prompt, limit)
    assert len(kept) == min(limit, len(prompt))
    assert kept.input_ids == prompt.input_ids[:limit]
    assert kept.spans == tuple(s for s in spans if s.start + s.length <= limit)
    assert cut(prompt, None) is prompt


def test_plain_shows_the_picture_and_learns_the_caption(tokenizer, model, folder):
    one = record("Say what you see. <image>", "a cat", image="red.png")
    row = make(tokenizer, model, one, template="plain", folder=folder)
    start = row.prompt.spans[0].start
    assert start == len(tokenizer.prefix_ids)
    after = row.prompt.input_ids[start + 4 :]
    assert tokenizer.decode(after, skip_special=False) == "a cat\n"
    assert row.prompt.loss_mask == [False] * (start + 4) + [True] * len(after)
    with pytest.raises(DataError, match=r"id '7'\): a plain template trains on a medium"):
        make(tokenizer, model, record("Q", "A"), template="plain")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, r"red.png does not exist.*: pictures are looked for beside .* --images, names$"),
        (b"", r"red.png is empty"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, r"red.png"),
        (b"<html>no</html>", r"red.png .*an HTML page"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(tokenizer, model, tmp_path, data, expected):
    if data is not None:
        (tmp_path / "red.png").write_bytes(data)
    one = record("<image>", "A", image="red.png")
    with pytest.raises(DataError, match=rf"d.json:3 \(id '7'\): .*{expected}"):
        make(tokenizer, model, one, folder=tmp_path)


def test_turns_out_of_order_are_named(tokenizer, model):
    one = record("Q", "A")
    one["conversations"].append({"from": "gpt", "value": "B"})
    with pytest.raises(DataError, match=r"id '7'\): message 2 is from assistant, expected user"):
        make(tokenizer, model, one)


def test_a_supervised_first_token_does_not_count():
    """A supervised first token is no label: no position stands before it."""
    prompt = EncodedPrompt([5, 6], [True, False])
    with pytest.raises(PromptError, match="no supervised token: every answer"):
        _check_supervised(prompt, prompt)
    _check_supervised(EncodedPrompt([5, 6], [False, True]), EncodedPrompt([5, 6], [False, True]))


def test_transparent_pictures_are_laid_on_white(tokenizer, model, tmp_path):
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (28, 28), "white").save(tmp_path / "white.png")

    def seen(name, **how):
        one = record("<image>\nQ", "A", image=name)
        encoder = SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], model, **how)
        sample = to_sample(one, where="d.json:1", resolve=lambda name: tmp_path / str(name))
        return encoder.encode(sample).media[0].pixel_values

    assert seen("clear.png", alpha="composite").equal(seen("white.png"))
    assert not seen("clear.png").equal(seen("white.png"))


def test_an_encoded_sample_skips_nothing_by_default():
    assert EncodedSample(EncodedPrompt([1], [True])).skipped == ()


def test_a_token_beyond_the_embeddings_is_refused(tmp_path, model):
    path = tmp_path / "tokenizer.model"
    train_tokenizer(corpus(1, 200), path, 500)
    tokenizer = SentencePieceTokenizer(
        TokenizerFiles(model=path.read_bytes(), added={"<far>": 5000})
    )
    sample = to_sample({"id": "a", "conversations": turns("Hi", "x <far>")}, where="d.json:1")
    with pytest.raises(DataError, match=r"d.json:1 .*'<far>' has the id 5000.* 500 rows"):
        SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], model).encode(sample)
