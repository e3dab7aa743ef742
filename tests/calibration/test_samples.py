"""Calibration samples: what files hold, what is chosen, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.calibration.samples import _some, embed_samples, in_float32, read_samples
from lapilli.checkpoint.load import STORED, load_checkpoint
from lapilli.errors import ConfigError, DataError, LapilliError
from tests.calibration.conftest import text_config, write_conversations
from tests.integration.oracle import make_llava

WORDS = "one two three four five six seven eight nine ten " * 40


@pytest.fixture(scope="module")
def loaded(small):
    return load_checkpoint(small, device="cpu", dtype=STORED)


def test_conversations_stay_whole_and_only_answers_count(loaded, conversations):
    samples = read_samples(conversations, 10, loaded)
    assert [sample.id for sample in samples] == ["0", "1", "2", "3"]
    for sample in samples:
        (span,) = sample.prompt.spans
        assert span.length == 16
        counted = [
            t for t, c in zip(sample.prompt.input_ids, sample.prompt.loss_mask, strict=True) if c
        ]
        assert (
            loaded.tokenizer.decode(counted).strip().startswith(("red", "green", "blue", "white"))
        )


def test_a_choice_is_always_the_same_one(loaded, conversations):
    chosen = [[s.id for s in read_samples(conversations, 2, loaded)] for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert chosen[0] == sorted(chosen[0])
    assert len(chosen[0]) == 2


@given(count=st.integers(0, 60), number=st.integers(1, 60))
def test_a_choice_keeps_the_order_and_takes_nothing_twice(count, number):
    chosen = _some(list(range(count)), number)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, number)


def test_texts_are_cut_into_blocks_of_the_context(loaded, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + WORDS.encode())
    found = read_samples(str(tmp_path / "t.txt"), 50, loaded)
    assert {len(sample.prompt) for sample in found} == {256}  # the context, shorter than 512
    assert all(all(sample.prompt.loss_mask) for sample in found)
    lines = [json.dumps({"text": WORDS[at : at + 200]}) for at in range(0, len(WORDS), 200)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert len(read_samples(str(tmp_path / "t.jsonl"), 50, loaded)) >= len(found)


def test_built_in_samples_are_half_pictures(loaded):
    found = read_samples("builtin", 5, loaded)
    assert [len(sample.prompt.spans) for sample in found] == [0, 0, 0, 1, 1]


def written(folder: Path, name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "few words", r"short.txt has \d+ tokens, and calibration takes blocks of"),
        ("empty.txt", "", "empty.txt has 0 tokens"),
        ("latin.txt", b"caf\xe9", "is no text in UTF-8"),
        ("empty.jsonl", "", "empty.jsonl"),
        ("empty.json", "[]", "empty.json"),
        ("short.jsonl", '{"text": "few words"}', "has .* tokens"),
        (
            "mixed.jsonl",
            '{"text": "a"}\n{"conversations": []}',
            r"mixed.jsonl.*2.*expected a record",
        ),
        ("null.jsonl", '{"text": "a"}\n{"text": null}', r"expected a record with"),
        ("none.jsonl", '{"text": "a"}\n5', r"none.jsonl"),
        ("seen.jsonl", '{"text": "a", "image": "a.png"}', r"seen.jsonl.*shows no pictures"),
        ("what.zip", b"PK\x03\x04", "what.zip is a ZIP archive"),
        ("what.md", "few words", r"what.md is no file of .* known: give \.txt, \.json, .*\.tar$"),
        ("cut.json", '[{"text": "a"}', r"cut.json:1: expected .* found the end.*cut off"),
        ("cut.json", '[{"text": "a', r"cut.json:1: no valid JSON: .*seems to be cut off"),
        ("cut.json", b'[{"text": "caf\xc3', r"cut.json:1: no UTF-8: .*seems to be cut off"),
        ("cut.json", "", r"cut.json is empty"),
    ],
)
def test_files_that_hold_no_samples(loaded, tmp_path, name, content, message):
    with pytest.raises((ConfigError, DataError), match=message):
        read_samples(written(tmp_path, name, content), 4, loaded)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none"])
def test_a_file_that_is_not_there(loaded, tmp_path, name):
    with pytest.raises(LapilliError, match="none"):
        read_samples(str(tmp_path / name), 4, loaded)


@pytest.mark.parametrize("name", ["", "folder.txt", "folder.json"])
def test_a_folder_holds_files_of_all_kinds(loaded, tmp_path, name):
    (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(
        DataError, match=r"is a folder: name a file in it .* \.txt, \.json,.*\.tar$"
    ):
        read_samples(tmp_path / name, 4, loaded)


def test_a_picture_that_is_missing_is_named(loaded, tmp_path):
    path = write_conversations(tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png"):
        read_samples(str(path), 4, loaded)


def test_a_sample_longer_than_the_context_is_named(loaded, tmp_path):
    path = write_conversations(tmp_path)
    lines = path.read_text("utf-8").replace('"gpt", "value": "green', f'"gpt", "value": "{WORDS}')
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"^1: .* \d+ positions, and the context of the model 256"
    ):
        read_samples(str(path), 4, loaded)


def test_no_samples_are_refused(loaded, conversations):
    with pytest.raises(ConfigError, match="1 or more, found 0"):
        read_samples(conversations, 0, loaded)


def test_embedded_samples_are_what_the_model_embeds(loaded, conversations):
    encoded = read_samples(conversations, 4, loaded)
    model = load_checkpoint(str(loaded.path), device="cpu", dtype="float32").model
    for sample, found in zip(
        encoded, embed_samples(loaded.model, encoded, torch.device("cpu")), strict=True
    ):
        wanted = model.embed_prompts([sample.prompt], [list(sample.media)]).inputs_embeds
        assert torch.equal(found.hidden, wanted)
        (span,) = sample.prompt.spans
        assert found.is_picture.nonzero()[:, 0].tolist() == list(range(span.start, span.start + 16))
        assert found.counts.tolist() == sample.prompt.loss_mask


def test_features_of_a_half_precision_checkpoint_are_not_rounded(tmp_path, conversations):
    oracle = make_llava(tmp_path / "half", text_config(num_hidden_layers=1))
    oracle.model.to(torch.bfloat16).save_pretrained(oracle.path)
    loaded = load_checkpoint(str(oracle.path), device="cpu", dtype=STORED)
    before = {name: one.data_ptr() for name, one in loaded.model.named_parameters()}
    encoded = read_samples(conversations, 1, loaded)
    (found,) = embed_samples(loaded.model, encoded, torch.device("cpu"))
    features = found.hidden[0, found.is_picture]
    assert not torch.equal(features, features.bfloat16().float())
    assert {name: one.data_ptr() for name, one in loaded.model.named_parameters()} == before


def test_a_module_is_in_float32_for_a_while_even_where_it_fails():
    linear = torch.nn.Linear(3, 2).half()
    linear.register_buffer("table", torch.ones(2, dtype=torch.float16))
    weight = linear.weight.data

    def fail():
        with in_float32(linear):
            assert linear.weight.dtype == linear.table.dtype == torch.float32
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert linear.weight.data_ptr() == weight.data_ptr()
    assert linear.table.dtype == torch.float16
    assert np.isfinite(linear.weight.detach().numpy()).all()
