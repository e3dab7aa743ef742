"""Inspection of checkpoints without reading their weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapilli.checkpoint import source as sources
from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.formats.weights import SafetensorsShard
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.checkpoint.load import STORED, load_checkpoint
from lapilli.checkpoint.read.plan import make_plan
from lapilli.errors import MissingFileError


@pytest.fixture
def no_reading(monkeypatch):
    """Reading a tensor fails the test."""

    def refuse(self, name, dtype=None):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsShard, "tensor", refuse)


@pytest.mark.slow
def test_original_with_anyres(golden, no_reading):
    _, built, _ = golden("llava-v1.6-mistral-tiny")
    found = inspect_checkpoint(built["model_path"])
    assert found.format == "original LLaVA, full"
    assert found.architecture["family"] == "mistral"
    assert found.template == {
        "name": "mistral_instruct",
        "reason": "model_type llava_mistral",
    }
    assert found.tower["from"] == "the checkpoint"
    assert found.visual_tokens["336x336"] == 88
    assert found.dtypes == {"bfloat16": sum(found.parameters.values())}
    assert found.num_bytes == 2 * sum(found.parameters.values())
    assert found.special_tokens["eos"] == "</s> (2)"
    assert "image_crop_resolution" in found.ignored_keys
    assert found.missing == found.unexpected == found.unknown_keys == ()


def test_lora(golden):
    _, built, _ = golden("llava-v1.5-tiny-lora")
    found = inspect_checkpoint(built["model_path"], template="llava_v0")
    assert found.format == "original LLaVA, LoRA"
    assert found.architecture["lora_rank"] == 4
    assert found.paths["base"] == built["model_base"]
    assert "the checkpoint says llava_v1" in found.template["note"]
    assert found.missing == ()


def test_missing_tensors_are_listed_without_an_error(golden, tmp_path, no_reading):
    _, built, _ = golden("llava-v1.5-tiny-leftpad")
    path = tmp_path / "llava-broken"
    shutil.copytree(built["model_path"], path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(3)
    save_file(tensors, file)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "mm_new_thing": 1}))
    found = inspect_checkpoint(path)
    assert found.missing == ("language_model.model.norm.weight",)
    assert found.unexpected == ("model.extra",)
    assert found.unknown_keys == ("mm_new_thing",)
    text = found.to_text()
    assert "unknown keys     1: mm_new_thing" in text
    assert "missing          1: language_model.model.norm.weight" in text
    assert json.loads(json.dumps(found.to_dict()))["unexpected"] == ["model.extra"]


def test_of_a_hub_repository_only_small_files_are_fetched(golden, tmp_path, monkeypatch):
    _, built, _ = golden("llava-v1.5-tiny-leftpad")
    repository, tower = tmp_path / "repository", tmp_path / "tower"
    small = shutil.ignore_patterns("*.safetensors", "*.bin")
    shutil.copytree(built["model_path"], repository, ignore=small)
    shutil.copytree(built["vision"], tower, ignore=small)
    raw = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps({**raw, "mm_vision_tower": "openai/clip"}))
    places = {"owner/llava-v1.5@main": repository, "openai/clip": tower}

    def fetch(name: str, *, weights: bool = True) -> Path:
        assert not weights
        return places[name]

    monkeypatch.setattr(sources, "fetch_snapshot", fetch)
    found = inspect_checkpoint("owner/llava-v1.5@main")
    assert found.template["name"] == "llava_v1"
    assert found.visual_tokens["336x336"] == 576
    assert found.parameters["language model"] > 0
    assert found.num_bytes == 0
    assert found.missing == ()


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match=r"config.json is missing in"):
        inspect_checkpoint(tmp_path)


def test_sampling_settings_that_are_not_applied_are_noted(tmp_path):
    path = tmp_path / "model"
    shutil.copytree(sources.resolve("pebble"), path)
    settings = {"repetition_penalty": 1.5, "suppress_tokens": [7], "num_beams": 1, "top_p": 0.9}
    (path / "generation_config.json").write_text(json.dumps(settings))
    told = [note for note in inspect_checkpoint(path).notes if note.startswith("generation_config")]
    assert len(told) == 2
    assert "repetition_penalty = 1.5, which is not applied" in told[0]
    assert "suppress_tokens = [7]" in told[1]
    assert not any("generation_config" in note for note in inspect_checkpoint("pebble").notes)


def test_the_settings_of_packed_layers_are_read(llava, packed_llava, tmp_path):
    loaded = load_checkpoint(str(llava), device="cpu", dtype=STORED, quantization="int8")
    save_loaded(tmp_path / "q", loaded, quantization=loaded.quantization)
    for path in (tmp_path / "q", packed_llava):
        found = inspect_checkpoint(path)
        assert found.quantization
        assert "quantization_config" not in found.ignored_keys
        assert found.unknown_keys == ()
        assert "quantization_config" in make_plan(path).keys.used
    assert "quantization_config" not in make_plan(llava).keys.used
