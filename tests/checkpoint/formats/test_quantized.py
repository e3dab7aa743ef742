"""Packed while loading, saved, read back: the same answers, and refusals that say what to do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lapilli
from lapilli.checkpoint.formats.quantized import (
    LayerQuantizer,
    faster_tower_dtype,
    is_packed_here,
    stored_quantization,
    with_quantization_file,
    written_quantization,
)
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.read.assemble import build_model
from lapilli.checkpoint.write.llava import save_llava
from lapilli.errors import ConfigError, ConfigFileError, UnsupportedModelError
from lapilli.quant import QuantConfig, quant_config, quantize
from lapilli.quant.autotune import Choices
from lapilli.quant.linear import QuantLinear, StoredEmbedding

IDS = torch.arange(12)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    language_model = model.language_model
    with torch.inference_mode():
        hidden = language_model(language_model.embed(IDS), position_ids=IDS)
        return language_model.logits(hidden)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_packing_while_loading_equals_quantize(name: str) -> None:
    whole = load_checkpoint("pebble", device="cpu", dtype="float32")
    quantize(whole.model, quant_config(name))
    direct = load_checkpoint("pebble", device="cpu", quantization=name)
    assert torch.equal(logits(direct.model), logits(whole.model))
    assert direct.dtype == torch.float32
    assert isinstance(direct.model.language_model.model.embed_tokens, StoredEmbedding)
    assert not any(parameter.requires_grad for parameter in direct.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(bits=8, quantize_tower=True),
        QuantConfig(group_size=32, levels="zeros", mode="weight_only", head_bits=4),
        QuantConfig(head_bits=4),
    ],
)
def test_saved_and_read_back(tmp_path: Path, config: QuantConfig) -> None:
    made = load_checkpoint("pebble", device="cpu", quantization=config)
    target = tmp_path / "llava-packed"
    save_llava(
        target,
        made.model,
        made.config,
        tokenizer_path=made.tokenizer_path,
        quantization=made.quantization,
    )
    back = load_checkpoint(target, device="cpu", strict_config=True)
    assert back.quantization == config
    assert torch.equal(logits(back.model), logits(made.model))
    layer = back.model.language_model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    assert layer.weight_only == (config.mode == "weight_only")
    tower = [m for m in back.model.modalities.modules() if isinstance(m, QuantLinear)]
    assert bool(tower) == config.quantize_tower
    picture = str(Path(lapilli.__file__).parents[2] / "examples" / "picture.png")
    assert lapilli.load(str(target)).ask("What is in this picture?", picture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_the_stored_quantization_may_be_asked_for(tmp_path: Path, name: str) -> None:
    made = load_checkpoint("pebble", device="cpu", quantization=name)
    target = tmp_path / "llava-packed"
    packed = made.quantization
    save_llava(
        target, made.model, made.config, tokenizer_path=made.tokenizer_path, quantization=packed
    )
    again = load_checkpoint(target, device="cpu", quantization=name)
    assert torch.equal(logits(again.model), logits(made.model))


@pytest.mark.slow
def test_another_quantization_than_the_stored_one_is_refused(tmp_path: Path) -> None:
    made = load_checkpoint("pebble", device="cpu", quantization="int8")
    target = tmp_path / "llava-packed"
    save_llava(
        target,
        made.model,
        made.config,
        tokenizer_path=made.tokenizer_path,
        quantization=made.quantization,
    )
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lapilli"
    with pytest.raises(
        ConfigError, match=r"is quantized already \(lapilli, 8 bits, groups of 32, dynamic\)"
    ):
        load_checkpoint(target, quantization="int4", device="cpu")


def test_quantization_of_unknown_libraries_is_refused() -> None:
    raw = {"quantization_config": {"quant_method": "hqq", "bits": 4}}
    with pytest.raises(UnsupportedModelError, match="quantized by 'hqq' cannot be read"):
        stored_quantization(raw)


@pytest.mark.parametrize(("symmetric", "levels"), [(True, "symmetric"), (False, "zeros")])
def test_directories_of_before_are_read(symmetric: bool, levels: str) -> None:
    """Until there were other levels, config.json said whether weights have zero points."""
    settings = written_quantization(QuantConfig(levels=levels))
    del settings["levels"]
    raw = {"quantization_config": {**settings, "symmetric": symmetric}}
    found = stored_quantization(raw)
    assert found is not None
    assert found.config == QuantConfig(levels=levels)


def test_unknown_options_are_refused() -> None:
    raw = {"quantization_config": {**written_quantization(QuantConfig()), "rotation": True}}
    with pytest.raises(ConfigError, match=r"has the keys .*rotation.*, this version reads"):
        stored_quantization(raw)
    assert stored_quantization({}) is None
    assert stored_quantization({"quantization_config": None}) is None


@pytest.mark.parametrize("found", [[], [{"quant_method": "awq"}], "awq", "", 4, 0, True, False])
def test_settings_that_are_no_object_are_refused(found: object, tmp_path: Path) -> None:
    raw = {"quantization_config": found}
    with pytest.raises(ConfigFileError, match=r"^config.json: quantization_config is .*expected"):
        stored_quantization(raw)
    (tmp_path / "quant_config.json").write_text('{"w_bit": 4}')
    with pytest.raises(ConfigFileError, match="expected an object with quant_method"):
        with_quantization_file(raw, tmp_path)
    with pytest.raises(ConfigFileError, match="expected an object with quant_method"):
        is_packed_here(raw)


@pytest.mark.slow
def test_saving_names_what_is_packed(tmp_path: Path) -> None:
    plain = load_checkpoint("pebble", device="cpu")
    with pytest.raises(ConfigError, match="is not quantized"):
        save_llava(tmp_path / "a", plain.model, plain.config, quantization=QuantConfig())
    quantize(plain.model, QuantConfig())
    with pytest.raises(ConfigError, match="is quantized: save it with the QuantConfig"):
        save_llava(tmp_path / "a", plain.model, plain.config)
    with pytest.raises(ConfigError, match="without dtype"):
        save_llava(
            tmp_path / "a",
            plain.model,
            plain.config,
            dtype=torch.float16,
            quantization=QuantConfig(),
        )


def test_only_a_large_tower_takes_the_faster_float() -> None:
    measured = []

    def timer(path: str, shape: tuple[int, int, int]) -> float:
        measured.append(shape)
        return {"float32": 5.0, "onednn": 5.0, "bfloat16": 1.0}[path]

    small = load_checkpoint("pebble", device="cpu").config
    choices = Choices(timer=timer)
    assert faster_tower_dtype(small, choices) is None
    assert measured == []
    tower = replace(
        small.vision, hidden_size=1024, intermediate_size=4096, image_size=336, patch_size=14
    )
    large = replace(small, vision=tower)
    assert faster_tower_dtype(large, choices) == torch.bfloat16
    assert set(measured) == {(4096, 1024, 577)}
    assert faster_tower_dtype(replace(small, vision=None), choices) is None


@pytest.mark.slow
def test_a_tower_in_the_faster_float_answers() -> None:
    chat = lapilli.load("pebble", quantize="int4", device="cpu")
    model = chat.model
    model.modalities.to(torch.bfloat16)
    picture = str(Path(lapilli.__file__).parents[2] / "examples" / "picture.png")
    assert chat.ask("What is in this picture?", picture)


@pytest.mark.slow
def test_packing_reads_the_tower_in_its_format() -> None:
    model = build_model(load_checkpoint("pebble", device="cpu").config)
    packing = LayerQuantizer(model, QuantConfig(), tower_dtype=torch.bfloat16)
    assert packing.dtype_of("modalities.image.projector.0.weight", torch.float32) == torch.bfloat16
    assert packing.dtype_of("language_model.model.norm.weight", torch.float32) == torch.float32
    assert packing.dtype_of("language_model.model.embed_tokens.weight", torch.float32) is None
    assert packing.dtype_of("language_model.lm_head.weight", torch.bfloat16) == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "inner"), [("cpu", torch.float32), ("meta", torch.bfloat16)], ids=str
)
def test_packed_layers_compute_in_float32_on_a_cpu_alone(device: str, inner: torch.dtype) -> None:
    loaded = load_checkpoint(
        "pebble", device=device, dtype="bfloat16", quantization="int4", check_finite=False
    )
    language_model = loaded.model.language_model
    assert language_model.embed(IDS.to(device)).dtype == inner
    assert language_model.model.norm.weight.dtype == torch.bfloat16
