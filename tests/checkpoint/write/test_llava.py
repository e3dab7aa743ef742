"""What is saved is loaded again, tensor for tensor and field for field."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.write.llava import save_llava, save_projector
from lapilli.errors import CheckpointError, ConfigError, MissingFileError, UnsupportedModelError
from lapilli.lora import LoraConfig, inject


def load(path, **options):
    return load_checkpoint(path, device="cpu", dtype="float32", **options)


def assert_same_weights(one, two):
    first, second = one.model.state_dict(), two.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["llava-v1.6-mistral-tiny", "llava-mpt-tiny", "llava-tiny-im-start-end"]
)
def test_round_trip(golden, tmp_path, variant):
    _, built, _ = golden(variant)
    before = load(built["model_path"])
    path = tmp_path / variant
    save_llava(path, before.model, before.config, tokenizer_path=before.tokenizer_path)
    after = load(path, strict_config=True)
    assert_same_weights(before, after)
    dtype_free = replace(after.config, torch_dtype=before.config.torch_dtype)
    assert dtype_free == before.config
    assert after.template == before.template
    assert after.tokenizer.encode("one two") == before.tokenizer.encode("one two")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inside", "beside", "named"])
def test_places_of_the_tower(golden, tmp_path, place):
    _, built, _ = golden("llava-tiny-identity")
    before = load(built["model_path"])
    path = tmp_path / "llava"
    save_llava(path, before.model, before.config, tokenizer_path=before.tokenizer_path, tower=place)
    if place == "beside":
        assert (path / "vision_tower" / "model.safetensors").is_file()
        moved = tmp_path / "elsewhere"
        path.rename(moved)
        path = moved
    after = load(path)
    assert_same_weights(before, after)
    assert after.config.vision_in_checkpoint is (place == "inside")
    assert after.config.image == before.config.image


@pytest.mark.slow
def test_shards_and_dtype(golden, tmp_path):
    _, built, _ = golden("llava-tiny-identity")
    before = load(built["model_path"])
    path = tmp_path / "llava"
    save_llava(
        path,
        before.model,
        before.config,
        tokenizer_path=before.tokenizer_path,
        dtype=torch.bfloat16,
        shard_bytes=100_000,
    )
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert all((path / file).stat().st_size < 150_000 for file in files)
    after = load(path)
    assert after.config.torch_dtype == "bfloat16"
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    rounded = before.model.state_dict()[name].bfloat16().float()
    assert torch.equal(after.model.state_dict()[name], rounded)


def test_a_directory_is_replaced_only_when_asked(golden, tmp_path):
    _, built, _ = golden("llava-tiny-identity")
    loaded = load(built["model_path"])
    path = tmp_path / "llava"
    path.mkdir()
    (path / "precious").write_text("keep")
    with pytest.raises(CheckpointError, match="llava is there already: choose another place"):
        save_llava(path, loaded.model, loaded.config)
    assert (path / "precious").read_text() == "keep"
    with pytest.raises(CheckpointError, match="as it is no checkpoint alone"):
        save_llava(path, loaded.model, loaded.config, overwrite=True)
    assert (path / "precious").read_text() == "keep"
    (path / "config.json").write_text("{}")  # now it is a checkpoint
    save_llava(path, loaded.model, loaded.config, overwrite=True)
    assert not (path / "precious").exists()
    assert [found.name for found in tmp_path.iterdir()] == ["llava"]


@pytest.mark.slow
def test_a_failed_save_leaves_nothing(golden, tmp_path):
    _, built, _ = golden("llava-tiny-identity")
    loaded = load(built["model_path"])
    other = replace(loaded.config, text=replace(loaded.config.text, family="gemma"))
    with pytest.raises(UnsupportedModelError, match="has no gemma language model"):
        save_llava(tmp_path / "llava", loaded.model, other)
    assert list(tmp_path.iterdir()) == []


def test_an_unmerged_adapter_is_refused(golden, tmp_path):
    _, built, _ = golden("llava-tiny-identity")
    loaded = load(built["model_path"])
    inject(loaded.model, LoraConfig(rank=2, alpha=4, targets=("language_model.*.q_proj",)))
    with pytest.raises(ConfigError, match="unmerged adapter"):
        save_llava(tmp_path / "llava", loaded.model, loaded.config)


@pytest.mark.slow
def test_projector_alone(golden, tmp_path):
    _, built, _ = golden("llava-v1.5-tiny-projector")
    before = load(built["model_path"], base=built["model_base"])
    path = tmp_path / "llava-projector"
    save_projector(path, before.model, before.config, base=built["model_base"])
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "mm_projector.bin"]
    assert_same_weights(before, load(path))


@pytest.mark.slow
def test_a_base_that_moved_brings_its_tower(golden, tmp_path):
    _, built, _ = golden("llava-tiny-identity")
    one = load(built["model_path"])
    base, moved, path = tmp_path / "b1", tmp_path / "b2", tmp_path / "llava-projector"
    save_llava(base, one.model, one.config, tokenizer_path=one.tokenizer_path, tower="beside")
    config = replace(one.config, vision_source=str(base / "vision_tower"))
    save_projector(path, one.model, config, base=str(base))
    base.rename(moved)
    after = load(path, base=str(moved))
    assert_same_weights(one, after)
    assert after.config.vision_source == str(moved / "vision_tower")
    (moved / "vision_tower").rename(tmp_path / "tower")
    with pytest.raises(
        MissingFileError, match=r"b1/vision_tower' is no directory.*b2 has no .*--base"
    ):
        load(path, base=str(moved))


def test_projector_without_named_tower(golden, tmp_path):
    _, built, _ = golden("llava-tiny-identity")
    loaded = load(built["model_path"])
    with pytest.raises(ConfigError, match="the vision tower has no name"):
        save_projector(tmp_path / "llava", loaded.model, replace(loaded.config, vision_source=None))


@pytest.mark.slow
def test_recorded_template(golden, tmp_path):
    _, built, _ = golden("llava-tiny-identity")
    loaded = load(built["model_path"])
    path = Path(tmp_path / "llava-v1.5")
    save_llava(
        path,
        loaded.model,
        loaded.config,
        tokenizer_path=loaded.tokenizer_path,
        template="llava_llama_2",
    )
    again = load(path, strict_config=True)
    assert again.template.template.name == "llava_llama_2"
