"""AWQ and GPTQ weights that cannot be read as they are, and what cannot be done with those read."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lapilli.checkpoint.formats.awq import PublishedLinear, published_format
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.write.llava import save_projector
from lapilli.errors import (
    CheckpointError,
    ConfigError,
    MissingWeightsError,
    ShapeMismatchError,
    UnsupportedModelError,
)
from lapilli.quant import QuantConfig
from tests.checkpoint.published import awq, convert, gptq, of_text_layers

LAYER = "language_model.model.layers.1.mlp.up_proj"


@pytest.fixture
def spoiled(packed_llava, tmp_path):
    """spoiled(change of the tensors) -> a copy of the AWQ checkpoint with it."""

    def make(change):
        path = tmp_path / "spoiled"
        shutil.copytree(packed_llava, path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        return path

    return make


def load(path, **options):
    return load_checkpoint(path, device="cpu", dtype="float32", **options)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (awq(version="gemv"), "AWQ of version 'gemv' cannot be read, only gemm"),
        (awq(version="marlin"), "AWQ of version 'marlin' cannot be read"),
        (awq(version="exllama"), "AWQ of version 'exllama' cannot be read"),
        (awq(bits=3), "AWQ weights in 3 bits cannot be read, only 4"),
        (awq(-1, backend="llm-awq"), "AWQ in llm-awq's layout has groups of 32, 64 or"),
        (awq(48), "AWQ groups of 48 cannot be read"),
        (gptq(bits=8), "GPTQ weights in 8 bits cannot be read, only 4"),
        (gptq(checkpoint_format="marlin"), "GPTQ of checkpoint_format 'marlin' cannot be read"),
        (gptq(is_marlin_format=True), "marlin's format is not read"),
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes' cannot be read"),
    ],
)
def test_unsupported_variants_are_refused_by_name(packed_llava, tmp_path, section, message):
    path = tmp_path / "other"
    shutil.copytree(packed_llava, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        load(path)
    assert "quantize='int4'" in str(refusal.value)


def test_a_section_without_bits():
    with pytest.raises(ConfigError, match=r"quantization_config\.bits is missing"):
        published_format({"quant_method": "awq"})


@pytest.mark.parametrize("piece", ["qweight", "qzeros", "scales"])
def test_a_missing_piece(spoiled, piece):
    def change(tensors):
        del tensors[next(name for name in tensors if name.endswith(f"1.mlp.up_proj.{piece}"))]

    with pytest.raises(MissingWeightsError, match=rf"no tensor in the files: {LAYER}\.{piece}"):
        load(spoiled(change))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("piece", "change", "error", "message"),
    [
        ("qweight", lambda x: x.t().contiguous(), ShapeMismatchError, "has shape"),
        ("scales", lambda x: x[:1].clone(), ShapeMismatchError, "asks for"),
        ("qzeros", lambda x: x.float(), CheckpointError, r"qzeros is torch\.float32, expected"),
        ("scales", lambda x: x.float() * 1e9, CheckpointError, "scales do not fit into float16"),
        ("scales", lambda x: x * float("nan"), CheckpointError, "NaN or infinite"),
    ],
)
def test_a_piece_that_does_not_fit(spoiled, piece, change, error, message):
    def spoil(tensors):
        name = next(name for name in tensors if name.endswith(f"1.mlp.up_proj.{piece}"))
        tensors[name] = change(tensors[name])

    with pytest.raises(error, match=message):
        load(spoiled(spoil))


def test_a_layer_that_cannot_be_packed():
    linear = nn.Linear(64, 12, device="meta")
    with pytest.raises(ShapeMismatchError, match="12 outputs, but AWQ packs 8"):
        PublishedLinear("a", linear, published_format(awq()))
    linear = nn.Linear(20, 16, device="meta")
    with pytest.raises(ShapeMismatchError, match="20 inputs, but GPTQ packs 8"):
        PublishedLinear("a", linear, published_format(gptq()))


def test_a_section_over_float_weights(llava, tmp_path):
    path = tmp_path / "float"
    shutil.copytree(llava, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": awq()}))
    with pytest.raises(CheckpointError, match=r"config\.json says AWQ, .* has a qweight"):
        load(path)


def test_act_order_is_refused(llava, tmp_path):
    packed, _ = convert(llava, tmp_path, gptq(32, desc_act=True), chosen=of_text_layers)
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("0.mlp.up_proj.g_idx"))
    order = torch.from_numpy(np.random.default_rng(0).permutation(128))
    save_file({**tensors, name: tensors[name][order]}, file)
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.g_idx spreads .*act-order"):
        load(packed)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(MissingWeightsError, match=r"up_proj\.g_idx"):
        load(packed)


def test_symmetric_weights_with_zero_points(llava, tmp_path):
    packed, _ = convert(llava, tmp_path, gptq(sym=True), chosen=of_text_layers)
    with pytest.raises(CheckpointError, match="qzeros are not all 7 or 8"):
        load(packed)


@pytest.mark.parametrize("asked", ["int8", QuantConfig(), QuantConfig(levels="zeros")])
def test_another_quantization_than_the_files_is_refused(packed_llava, asked):
    what = r"quantized already \(AWQ, 4 bits, groups of 64, zero points\).*group_size=64"
    with pytest.raises(ConfigError, match=what):
        load(packed_llava, quantization=asked)


def test_no_projector_of_packed_layers(packed_llava, tmp_path):
    loaded = load(packed_llava, quantization="int4", quantize_tower=True)
    with pytest.raises(ConfigError, match="the projector is quantized"):
        save_projector(tmp_path / "projector", loaded.model, loaded.config)


def test_an_adapter_is_refused(golden, tmp_path):
    _, built, _ = golden("llava-v1.5-tiny-lora")
    base = tmp_path / "base"
    shutil.copytree(built["model_base"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": awq()}))
    for options in ({}, {"merge_lora": False}):
        with pytest.raises(ConfigError, match="cannot be laid over quantized layers"):
            load(built["model_path"], base=str(base), **options)
