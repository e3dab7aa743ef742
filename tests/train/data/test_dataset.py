import json

import numpy as np
import pytest
from hypothesis import given, settings
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
from lapilli.train.recipe import DataRecipe, RunRecipe, SourceRecipe
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
