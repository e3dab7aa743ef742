"""Samples under one numbering, and the fingerprint of a run, of which nothing is the machine's."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.errors import DataError
from lapilli.prompt.encode import EncodedPrompt
from lapilli.prompt.template import TEMPLATES
from lapilli.train.data import (
    Dataset,
    EncodedDataset,
    EncodedSample,
    SampleEncoder,
    encoded_dataset,
    open_dataset,
    order_of,
)
from lapilli.train.data.dataset import SAMPLED_BYTES, data_file, fingerprint_of, together
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
)
from tests.train.data.conftest import turns


def encoder(tokenizer, model, max_length=None, template="vicuna_v1"):
    return SampleEncoder(tokenizer, TEMPLATES[template], model, max_length)


def test_a_folder_becomes_encoded_samples(folder, tokenizer, model):
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    rows = EncodedDataset(dataset, encoder(tokenizer, model))
    one, none, two = (rows.sample(i) for i in range(3))
    assert [row.id for row in (one, none, two)] == ["one", "none", "two"]
    assert [len(row.media) for row in (one, none, two)] == [1, 0, 2]
    assert one.media[0].pixel_values.shape == (1, 3, 28, 28)
    assert [span.length for span in two.prompt.spans] == [4, 4]
    assert dataset.words().tolist() == [9, -6, 9]


def test_a_bad_sample_ends_the_run_or_is_replaced_by_the_next(folder, tokenizer, model):
    (folder / "red.png").write_bytes(b"no picture")
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    with pytest.raises(DataError, match=r"data.json:2 \(id 'one'\): .*red.png"):
        EncodedDataset(dataset, encoder(tokenizer, model)).sample(0)
    rows = EncodedDataset(dataset, encoder(tokenizer, model), on_bad_sample="skip")
    row = rows.sample(2)
    assert row.id == "none"
    assert len(row.skipped) == 2
    assert "'two'" in row.skipped[0]
    assert "'one'" in row.skipped[1]


def test_when_nothing_can_be_read_the_run_ends(folder, tokenizer, model):
    bad = [{"conversations": turns("Q", "")}] * 3
    (folder / "data.json").write_text(json.dumps(bad))
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    rows = EncodedDataset(dataset, encoder(tokenizer, model), on_bad_sample="skip")
    with pytest.raises(DataError, match=r"none of 3 samples can be learned from; the first: .*:1"):
        rows.sample(1)


class Numbers:
    """A source whose records are numbers."""

    def __init__(self, name, count):
        self.name, self._count = name, count

    def __len__(self):
        return self._count

    def record(self, index):
        return {"id": f"{self.name}/{index}", "conversations": turns("Q " * (index + 1), "A")}

    def where(self, index):
        return f"{self.name}:{index}"

    def media(self, index, name):
        raise AssertionError

    def notes(self, index, pictures):
        return ()


def ids(dataset):
    return [dataset.sample(i).id for i in range(len(dataset))]


@pytest.mark.slow
@settings(max_examples=20)
@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=3),
    st.floats(0.01, 0.45),
    st.integers(0, 50),
)
def test_what_is_held_out_is_never_learned(counts, share, seed):
    sources = [Numbers(f"s{number}", count) for number, count in enumerate(counts)]
    whole = Dataset(sources)
    kept, held = whole.split(share, seed=seed)
    assert sorted(ids(kept) + ids(held)) == sorted(ids(whole))
    assert held.counts == tuple(max(1, round(share * count)) for count in counts)
    again = Dataset(sources).split(share, seed=seed)
    assert (ids(again[0]), ids(again[1])) == (ids(kept), ids(held))
    backwards = Dataset(sources[::-1]).split(share, seed=seed)[1]
    assert sorted(ids(backwards)) == sorted(ids(held))
    inner, _ = kept.split(share, seed=seed) if min(kept.counts) > 1 else (kept, held)
    assert set(ids(inner)) <= set(ids(kept))


def test_seeds_hold_out_others_and_folders_do_not_matter():
    def held(name, seed):
        return [
            i.rpartition("/")[2]
            for i in ids(Dataset([Numbers(name, 100)]).split(0.1, seed=seed)[1])
        ]

    assert held("a.json", 0) != held("a.json", 1)
    assert held("a.json", 0) == held("/data/a.json", 0)
    assert held("a.json", 0) != held("b.json", 0)
    with pytest.raises(DataError, match=r"b.json has 1 samples: holding out 1 leaves none"):
        Dataset([Numbers("a.json", 9), Numbers("b.json", 1)]).split(0.1, seed=0)


def test_words_follow_the_split_and_are_counted_once(monkeypatch):
    source = Numbers("a", 20)
    kept, _ = Dataset([source]).split(0.2, seed=3)
    expected = [-(int(name.rpartition("/")[2]) + 2) for name in ids(kept)]
    assert kept.words().tolist() == expected
    monkeypatch.setattr(Numbers, "record", None)
    assert kept.words().tolist() == expected


class Mixed(Numbers):
    """Every second sample has a picture, and those in `bad` cannot be read."""

    def __init__(self, count, bad):
        super().__init__("m", count)
        self._bad = bad

    def record(self, index):
        shown = {"image": "a.png"} if index % 2 else {}
        places = "<image>" * (index % 2)
        answer = "" if index in self._bad else "A"
        return {"id": str(index), **shown, "conversations": turns(f"{places}Q", answer)}

    def media(self, index, name):
        return name

    def notes(self, index, pictures):
        return ()


class Words:
    """Rows of samples that say something."""

    def encode(self, sample):
        if not sample.messages[-1].text:
            raise DataError(f"{sample.id} is bad")
        return EncodedSample(EncodedPrompt([], [], ()), id=sample.id)


@pytest.mark.slow
@given(st.integers(2, 12), st.data())
def test_a_sample_of_the_same_kind_stands_in_where_batches_have_one_kind(count, data):
    bad = data.draw(st.sets(st.integers(0, count - 1)))
    index = data.draw(st.integers(0, count - 1))
    dataset = Dataset([Mixed(count, bad)])
    rows = encoded_dataset(dataset, Words(), DataRecipe(group="modality", on_bad_sample="skip"))
    ring = [*range(index, count), *range(index)]
    alike = [at for at in ring if at % 2 == index % 2]
    expected = next((at for at in alike if at not in bad), None)
    if expected is None:
        with pytest.raises(DataError, match=f"none of {len(alike)} samples of a kind"):
            rows.sample(index)
        return
    row = rows.sample(index)
    assert row.id == str(expected)
    assert row.skipped == tuple(f"{at} is bad" for at in alike[: alike.index(expected)])


@pytest.mark.parametrize("group", ["none", "length"])
def test_any_sample_stands_in_where_kinds_are_mixed(group):
    recipe = DataRecipe(group=group, on_bad_sample="skip")
    assert encoded_dataset(Dataset([Mixed(4, {1})]), Words(), recipe).sample(1).id == "2"


def test_the_order_of_a_recipe(tmp_path):
    sources = []
    for name, count, weight in (("a", 10, 1.0), ("b", 5, 2.0)):
        records = [json.dumps(Numbers(name, count).record(i)) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(records))
        sources.append(SourceRecipe(path=str(tmp_path / f"{name}.jsonl"), weight=weight))
    dataset, held = open_dataset(sources).split(0.2, seed=3)
    assert (dataset.counts, held.counts) == ((8, 4), (2, 1))
    run = RunRecipe(batch_size=2, gradient_accumulation_steps=2, seed=5)
    order = order_of(dataset, DataRecipe(group="length"), run)
    assert order.epoch_size == 16
    seen = [i for step in range(4) for micro in range(2) for i in order.indices(step, micro)]
    assert np.bincount(seen).tolist() == [1] * 8 + [2] * 4
    assert order_of(dataset, DataRecipe(), run).step_size == 4


@pytest.fixture
def recipe(tmp_path):
    """Two sources, one of them in two files."""
    folder = tmp_path / "data"
    folder.mkdir()
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    for name, count in (("a.json", 3), ("b0.json", 1), ("b1.json", 2)):
        records = [{"id": f"{name}/{i}", "conversations": turns} for i in range(count)]
        (folder / name).write_text(json.dumps(records))
    return Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=0.1),
        run=RunRecipe(batch_size=2),
        data=DataRecipe(sources=sources_in(folder), held_out=0.3),
        lora=LoraRecipe(base="nf4"),
    )


def sources_in(folder, weight=1.0):
    names = ("a.json", "b{0..1}.json")
    return tuple(SourceRecipe(path=str(folder / name), weight=weight) for name in names)


def fingerprint(recipe, template="vicuna_v1"):
    counts = [len(source) for source in open_dataset(recipe.data.sources).sources]
    return fingerprint_of(recipe, template, counts, {})


def changed(recipe, section, **values):
    return replace(recipe, **{section: replace(getattr(recipe, section), **values)})


def differences(ours, theirs):
    return {name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "name", "sgd"),
        ("lora", "rank", 8),
        ("lora", "alpha", 32.0),
        ("lora", "base", "int4"),
        ("lora", "double_quant", True),
        ("run", "seed", 1),
        ("run", "batch_size", 3),
        ("run", "gradient_accumulation_steps", 2),
        ("data", "held_out", 0.4),
        ("data", "max_length", 100),
        ("data", "group", "modality"),
        ("data", "pack", True),
        ("data", "placement", "written"),
        ("data", "alpha", "composite"),
    ],
)
def test_a_key_that_makes_another_run_is_in_the_fingerprint(recipe, section, key, value):
    before, after = fingerprint(recipe), fingerprint(changed(recipe, section, **{key: value}))
    assert differences(before, after) == {f"{section}.{key}"}
    assert after[f"{section}.{key}"] == value
    assert differences(before, fingerprint(recipe, "plain")) == {"data.template"}


def test_a_run_without_adapters_or_of_another_stage_is_another(recipe):
    whole = replace(recipe, lora=None)
    gone = {f"lora.{name}" for name in ("rank", "alpha", "base", "double_quant")}
    assert differences(fingerprint(recipe), fingerprint(whole)) == gone
    assert differences(fingerprint(whole), fingerprint(replace(whole, stage="align"))) == {"stage"}


def test_a_key_that_may_change_on_resume_is_not_in_the_fingerprint(recipe):
    later = changed(
        recipe, "run", steps=9, epochs=2.0, precision="bfloat16", log_every=1, save_every=1,
        threads=1, workers=2, sharding="fsdp", gradient_checkpointing=True, reduction="llava",
    )  # fmt: skip
    later = changed(later, "optim", lr=0.2, warmup_steps=5, max_grad_norm=2.0)
    later = changed(later, "lora", dropout=0.2)
    later = changed(later, "data", on_bad_sample="skip")
    assert fingerprint(later) == fingerprint(recipe)


def test_a_folder_that_moved_has_the_same_data(recipe, tmp_path):
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = changed(recipe, "data", sources=sources_in(tmp_path / "elsewhere"))
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "data")
    assert fingerprint(moved) == fingerprint(recipe)


def test_other_data_are_told_by_what_differs(recipe, tmp_path):
    before = fingerprint(recipe)
    file = tmp_path / "data" / "b1.json"
    file.write_text(file.read_text().replace('"A"', '"B"'))
    assert differences(before, fingerprint(recipe)) == {"data.sources[1].content"}
    (tmp_path / "data" / "a.json").write_text(json.dumps([{"id": 1}]))
    assert {"data.sources[0].content", "data.sources[0].samples"} <= differences(
        before, fingerprint(recipe)
    )
    weighted = changed(recipe, "data", sources=sources_in(tmp_path / "data", weight=0.5))
    assert differences(fingerprint(recipe), fingerprint(weighted)) == {
        "data.sources[0].weight",
        "data.sources[1].weight",
    }
    fewer = changed(recipe, "data", sources=recipe.data.sources[:1])
    assert differences(fingerprint(recipe), fingerprint(fewer)) == {
        f"data.sources[1].{key}" for key in ("samples", "weight", "path", "content")
    }


def test_the_share_that_is_held_out_counts_only_where_it_is(recipe):
    own = changed(recipe, "data", evaluation=recipe.data.sources[:1])
    assert fingerprint(own)["data.held_out"] == 0.0
    assert fingerprint(own) == fingerprint(changed(own, "data", held_out=0.0))


def test_another_model_below_is_told_by_its_key(recipe, tmp_path):
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]))
    one, other = (
        fingerprint_of(recipe, "", [3, 3], {"model.checkpoint": [file]}) for file in files
    )
    assert differences(one, other) == {"model.checkpoint.content"}


def test_a_fingerprint_is_plain_json(recipe):
    found = fingerprint(recipe)
    assert json.loads(json.dumps(found)) == found
    assert found["data.sources[1].path"] == "b{0..1}.json"
    assert found["data.sources[1].samples"] == 3


LARGE = 3 * SAMPLED_BYTES + 12345


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A sparse file that is read in pieces."""
    path = tmp_path_factory.mktemp("large") / "shard.tar"
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


def put(path, at, data):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@given(st.binary(min_size=1, max_size=200), st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_digest_of_a_small_file_is_of_its_content(tmp_path, content, data):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    path.write_bytes(content)
    found = data_file(path)
    assert found.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert (found.name, found.num_bytes) == ("a.json", len(content))
    at = data.draw(st.integers(0, len(content) - 1))
    other.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert data_file(other).digest != found.digest


def test_neither_folder_nor_time_changes_a_digest(tmp_path):
    (tmp_path / "moved").mkdir()
    path, moved = tmp_path / "a.json", tmp_path / "moved" / "a.json"
    path.write_bytes(b"[]")
    moved.write_bytes(b"[]")
    os.utime(moved, (1, 1))
    assert data_file(path) == data_file(moved)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, LARGE - 1, SAMPLED_BYTES * 3 // 63])
def test_a_large_file_is_read_in_pieces_from_the_first_byte_to_the_last(large, at):
    before = data_file(large)
    assert before.digest.startswith("in pieces, sha256:")
    put(large, at, b"\1")
    changed = data_file(large).digest
    put(large, at, b"\0")
    assert changed != before.digest == data_file(large).digest


def test_a_change_between_the_pieces_is_seen_when_all_is_read(large):
    in_pieces, whole = data_file(large), data_file(large, whole_bytes=LARGE)
    put(large, LARGE // 126, b"\1")
    assert data_file(large) == in_pieces
    changed = data_file(large, whole_bytes=LARGE)
    put(large, LARGE // 126, b"\0")
    assert changed.digest != whole.digest
    assert not whole.digest.startswith("in pieces")


def test_another_size_is_another_digest(large, tmp_path):
    longer = tmp_path / "shard.tar"
    with longer.open("wb") as file:
        file.truncate(LARGE + 1)
    assert data_file(longer).digest != data_file(large).digest


def test_the_order_of_files_changes_their_digest(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    files = [data_file(tmp_path / name) for name in "ab"]
    assert together(files) != together(files[::-1])
    assert together(files).startswith("sha256:")
