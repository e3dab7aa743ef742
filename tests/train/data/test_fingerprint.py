"""What makes another run of a recipe, and what does not."""

import json
import shutil
from dataclasses import replace

import pytest

from lapilli.train.data import open_dataset
from lapilli.train.data.fingerprint import fingerprint_of
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
)


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
