"""Checkpoints that cannot be loaded: the error names the thing, and says what to do."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.read import assemble
from lapilli.errors import (
    CheckpointError,
    ConfigError,
    MissingFileError,
    MissingWeightsError,
    ShapeMismatchError,
    UnknownKeyError,
    UnsafeFileError,
    UnsupportedModelError,
)


def load(path, **options):
    return load_checkpoint(path, device="cpu", dtype="float32", **options)


@pytest.fixture
def copy(golden, tmp_path):
    """copy(variant) -> (checkpoint, base or None), to be damaged."""

    def make(variant):
        _, built, _ = golden(variant)
        source = Path(built["model_path"]).parent
        target = tmp_path / variant
        shutil.copytree(source, target)
        path = target / Path(built["model_path"]).name
        change_json(path / "config.json", mm_vision_tower=str(target / Path(built["vision"]).name))
        base = built["model_base"] and target / Path(built["model_base"]).name
        return path, base

    return make


def change_json(path, **changes):
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def change_weights(file, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


SAFE = "llava-v1.5-tiny-leftpad"
SHARDED = "llava-v1.6-mistral-tiny"
BINARY = "llava-tiny-identity"
LORA = "llava-v1.5-tiny-lora"
PROJECTOR = "llava-v1.5-tiny-projector"


def test_no_such_directory():
    with pytest.raises(MissingFileError, match="'/no/such/place' is neither a directory nor"):
        load("/no/such/place")


def test_a_file_is_no_directory(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        load(str(file))


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_the_folder_of_a_training_run_names_its_model_folder(tmp_path, file):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / file).write_text("{}")
    with pytest.raises(MissingFileError, match=rf"did you mean {tmp_path / 'model'}\?"):
        load(tmp_path)


def test_no_config(copy):
    path, _ = copy(SAFE)
    (path / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config.json is missing in .*leftpad: is this the"):
        load(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", r"not valid JSON: .* in line 1"), ("[1]", "must hold a JSON object, got list")],
)
def test_damaged_config(copy, text, match):
    path, _ = copy(SAFE)
    (path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=match):
        load(path)


def test_unknown_model_type(copy):
    path, _ = copy(SAFE)
    change_json(path / "config.json", model_type="flamingo")
    with pytest.raises(UnsupportedModelError, match=r"model_type 'flamingo' .* llava_llama"):
        load(path)


def test_unknown_key_under_strict_config(copy):
    path, _ = copy(SAFE)
    change_json(path / "config.json", mm_new_thing=1)
    assert load(path).report.keys.unknown == ("mm_new_thing",)
    with pytest.raises(UnknownKeyError, match="mm_new_thing"):
        load(path, strict_config=True)


def test_no_weights(copy):
    path, _ = copy(SAFE)
    (path / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"no weights in .* looked for model.safetensors"):
        load(path)


def test_missing_shard(copy):
    path, _ = copy(SHARDED)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        MissingFileError, match=r"index.json names model-00002-of-00003.*1 of 3 weight files"
    ):
        load(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingFileError, match="2 of 3 weight files are in"):
        load(path)


def test_index_that_leaves_its_directory(copy):
    path, _ = copy(SHARDED)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names '../secret.safetensors', outside"):
        load(path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(path)


@pytest.mark.parametrize("keep", [0, 4, 500, 60_000])
def test_truncated_safetensors(copy, keep):
    path, _ = copy(SAFE)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors.* is truncated"):
        load(path)


@pytest.mark.parametrize("keep", [0, 100, 60_000])
def test_truncated_pickle(copy, keep):
    path, _ = copy(BINARY)
    file = path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin \(\d+ bytes\) is truncated"):
        load(path)


class Opens:
    """What an attacker puts into a pickle."""

    def __reduce__(self):
        return (print, ("code of the pickle ran",))


@pytest.mark.parametrize("is_archive", [True, False])
def test_pickle_with_code_is_refused(copy, capsys, is_archive):
    path, _ = copy(BINARY)
    file = path / "pytorch_model.bin"
    if is_archive:
        torch.save({"x": torch.zeros(1), "y": Opens()}, file)
    else:
        file.write_bytes(pickle.dumps({"y": Opens()}, protocol=2))
    with pytest.raises(UnsafeFileError, match=r"is refused: it is a pickle that would run code"):
        load(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(1)], "holds a list, expected named tensors"),
        ({"epoch": 3}, "'epoch' is a int, expected a tensor"),
    ],
)
def test_pickle_of_something_else(copy, content, match):
    path, _ = copy(BINARY)
    torch.save(content, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=match):
        load(path)


def test_old_pickle_format_is_read(copy):
    path, _ = copy(BINARY)
    file = path / "pytorch_model.bin"
    before = load(path).model.state_dict()
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    after = load(path).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_missing_and_unexpected_tensors_are_counted(copy):
    path, _ = copy(SAFE)

    def change(tensors):
        for layer in range(4):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)

    change_weights(path / "model.safetensors", change)
    with pytest.raises(
        MissingWeightsError,
        match=r"4 parameters have no tensor .*up_proj.weight.* and 1 more; 1 tensors of the files",
    ):
        load(path)


def test_wrong_shape(copy):
    path, _ = copy(SAFE)
    change_json(path / "config.json", intermediate_size=96)
    with pytest.raises(
        ShapeMismatchError,
        match=r"down_proj.weight \(checkpoint\) has shape \(64, 128\).*\(64, 96\)",
    ):
        load(path)


def test_wrong_vocabulary(copy):
    path, _ = copy(SAFE)
    change_json(path / "config.json", vocab_size=1200)
    with pytest.raises(ShapeMismatchError, match=r"has 1000 rows .* the vocabulary has 1200"):
        load(path)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(copy, value):
    path, _ = copy(SAFE)

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value

    change_weights(path / "model.safetensors", change)
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.up_proj.weight \(checkpoint\) has 1 values of 8192"
    ):
        load(path)
    assert load(path, check_finite=False).report.missing == ()


def test_vocabulary_tables_are_checked_in_a_copy(copy, monkeypatch):
    """Rows that nobody uses stay out of memory: the model's table is not what is summed."""
    path, _ = copy(SAFE)
    change_weights(
        path / "model.safetensors",
        lambda tensors: tensors.update({name: x.float() for name, x in tensors.items()}),
    )
    summed = {}
    monkeypatch.setattr(
        assemble,
        "check_values",
        lambda name, tensor: summed.update({name.split()[0]: tensor.data_ptr()}),
    )
    model = load_checkpoint(path, device="cpu", dtype="float32").model.language_model
    assert summed["model.norm.weight"] == model.model.norm.weight.data_ptr()
    assert summed["model.embed_tokens.weight"] != model.model.embed_tokens.weight.data_ptr()


def test_no_tokenizer(copy):
    path, _ = copy(SAFE)
    (path / "tokenizer.model").unlink()
    with pytest.raises(MissingFileError, match=r"no tokenizer in .*: looked for tokenizer.model"):
        load(path)


def test_no_tower(copy):
    path, _ = copy(SAFE)
    change_json(path / "config.json", mm_vision_tower="/no/tower")
    with pytest.raises(MissingFileError, match=r"vision tower of .* '/no/tower' is neither"):
        load(path)


def test_tower_without_weights(copy):
    path, _ = copy(SAFE)
    tower = Path(json.loads((path / "config.json").read_text())["mm_vision_tower"])
    for file in tower.glob("pytorch_model*"):
        file.unlink()
    with pytest.raises(MissingFileError, match="no weights of the vision tower in"):
        load(path)


def test_tuned_tower_that_is_not_in_the_checkpoint(copy):
    path, _ = copy(SAFE)
    change_json(path / "config.json", unfreeze_mm_vision_tower=True)
    with pytest.raises(
        MissingWeightsError, match=r"unfreeze_mm_vision_tower is true.* has none of its weights"
    ):
        load(path)


@pytest.mark.slow
def test_frozen_tower_in_the_checkpoint_is_left_out(copy):
    path, _ = copy(SHARDED)
    tuned = load(path).model.state_dict()
    change_json(path / "config.json", unfreeze_mm_vision_tower=False)
    loaded = load(path)
    name = "modalities.image.vision_tower.vision_model.embeddings.class_embedding"
    assert not torch.equal(tuned[name], loaded.model.state_dict()[name])
    assert any("it was frozen" in note for note in loaded.report.notes)
    assert any(dropped.startswith("model.vision_tower.") for dropped in loaded.report.dropped)


def test_another_tower(copy):
    path, _ = copy(SAFE)
    change_json(path / "config.json", mm_hidden_size=48)
    with pytest.raises(ConfigError, match=r"mm_hidden_size is 48, but .* hidden_size 32"):
        load(path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [LORA, PROJECTOR])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 32}, "hidden_size is 32 in the base and 64 in the adapter"),
        ({"num_hidden_layers": 5}, "num_layers is 5 in the base and 3 in the adapter"),
        ({"vocab_size": 2000}, "vocab_size is 2000 in the base and 1000 in the adapter"),
    ],
)
def test_wrong_base(copy, variant, change, match):
    path, base = copy(variant)
    change_json(base / "config.json", **change)
    with pytest.raises(ShapeMismatchError, match=f"is not the base that .* trained on: .*{match}"):
        load(path, base=str(base))


def test_base_that_is_not_there(copy):
    path, base = copy(LORA)
    shutil.rmtree(base)
    change_json(path / "adapter_config.json", base_model_name_or_path="/gone/base")
    with pytest.raises(MissingFileError, match="was trained on '/gone/base', which is not there"):
        load(path)


def test_base_for_a_whole_model(copy):
    path, _ = copy(SAFE)
    with pytest.raises(ConfigError, match="is a whole model: a base is for LoRA"):
        load(path, base=str(path))


def test_lora_without_projector(copy):
    path, base = copy(LORA)
    (path / "non_lora_trainables.bin").unlink()
    with pytest.raises(MissingFileError, match=r"non_lora_trainables.bin is missing in"):
        load(path, base=str(base))


def test_lora_without_adapter_weights(copy):
    path, base = copy(LORA)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(MissingFileError, match=r"no adapter weights in .*adapter_model.bin"):
        load(path, base=str(base))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora true is not supported"),
    ],
)
def test_other_adapters(copy, change, match):
    path, base = copy(LORA)
    change_json(path / "adapter_config.json", **change)
    with pytest.raises(UnsupportedModelError, match=match):
        load(path, base=str(base))


def test_device_and_dtype_that_do_not_exist(copy):
    path, _ = copy(SAFE)
    with pytest.raises(ConfigError, match="dtype 'float12' is unknown: choose from auto, bfloat16"):
        load_checkpoint(path, device="cpu", dtype="float12")
    with pytest.raises(ConfigError, match="device 'abacus' is unknown"):
        load_checkpoint(path, device="abacus")
