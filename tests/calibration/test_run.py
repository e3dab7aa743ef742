"""A checkpoint quantized from samples: every method and format, read back, and what is refused."""

import gc
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, MptConfig, MptForCausalLM

import lapilli
from lapilli.calibration import CalibrationOptions, quantize_from_samples
from lapilli.checkpoint.load import STORED, load_checkpoint
from lapilli.errors import CheckpointError, ConfigError, LapilliError
from lapilli.prompt.encode import EncodedPrompt
from lapilli.quant import QuantConfig
from lapilli.quant.linear import QuantLinear
from tests.calibration.conftest import quantized, text_config, write_conversations
from tests.integration.oracle import make_llava, make_oracle, make_tokenizer

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("awq", "mbq")]
PICTURE = Image.new("RGB", (28, 28), "red")
WEIGHTS = "model.safetensors"
UP = "layers.1.mlp.up_proj.weight"


def answer(path: object, *pictures: Image.Image) -> str:
    chat = lapilli.load(str(path), device="cpu")
    return chat.ask("What?", *pictures, max_new_tokens=4)


def packed_layers(path: Path) -> dict[str, QuantLinear]:
    model = load_checkpoint(str(path), device="cpu", dtype=STORED).model
    return {name: one for name, one in model.named_modules() if isinstance(one, QuantLinear)}


@pytest.mark.parametrize("form", ["lapilli", "gemm", "llm-awq"])
@pytest.mark.parametrize("method", ["rtn", "gptq", *SLOW])
def test_every_method_in_every_format_answers(small, conversations, tmp_path, method, form):
    target = tmp_path / "llava-small"
    options = {"method": method, "form": form, "rotate": method == "rtn", "number": 3}
    if method != "rtn":
        options["samples"] = conversations
    reports = quantized(small, target, options)
    assert answer(target, PICTURE) is not None
    layers = packed_layers(target)
    assert len(layers) == 3 * 7 + (form == "lapilli")
    assert [report.index for report in reports] == [0, 1, 2]
    assert all(report.error <= report.error_before for report in reports)
    kept = json.loads((target / "quantization.json").read_text("utf-8"))
    assert kept["options"]["method"] == method
    assert len(kept["layers"]) == (0 if method == "rtn" else 3)
    assert [found.name for found in tmp_path.iterdir()] == ["llava-small"]  # nothing beside it


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"levels": "nonlinear"}, 4),
        ({"levels": "symmetric", "group_size": 32}, 4),
        ({"levels": "zeros", "group_size": 64, "mode": "weight_only"}, 4),
        ({"levels": "zeros", "group_size": 128}, 3),
        ({"levels": "symmetric", "group_size": 64}, 3),
        ({"levels": "nonlinear", "quantize_tower": True}, 4),
    ],
)
@pytest.mark.parametrize("method", ["gptq", SLOW[0]])
def test_levels_groups_bits_and_towers(small, conversations, tmp_path, method, config, bits):
    options = {"method": method, "samples": conversations, "number": 4, "bits": bits}
    quantized(small, tmp_path / "q", options, **config)
    assert answer(tmp_path / "q", PICTURE) is not None
    layers = packed_layers(tmp_path / "q")
    assert any(name.startswith("modalities.") for name in layers) == ("quantize_tower" in config)
    gate = layers["language_model.model.layers.1.mlp.gate_proj"]
    assert gate.weight_only == (config.get("mode") == "weight_only")
    assert gate.group_size == config.get("group_size", 64)
    values = gate.weight_rows(0, 16)
    if config["levels"] == "zeros":
        groups = values.view(16, -1, config["group_size"])
        assert max(len(row.unique()) for row in groups.flatten(0, 1)) <= 1 << bits


def logits(path: object) -> torch.Tensor:
    loaded = load_checkpoint(str(path), device="cpu", dtype="float32")
    ids = list(range(4, 64))
    with torch.no_grad():
        batch = loaded.model.embed_prompts([EncodedPrompt(ids, [False] * len(ids))])
        return loaded.model.logits(loaded.model.forward(batch))


def missed(path: object, source: object) -> float:
    """The error of the logits relative to them."""
    wanted = logits(source)
    return float((logits(path) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("method", "form"), [("rtn", "gemm"), ("gptq", "lapilli"), ("gptq", "gemm")]
)
def test_a_rotated_model_says_nearly_the_same(small, text, tmp_path, method, form):
    options = {"method": method, "rotate": True, "number": 8, "form": form}
    if method != "rtn":
        options["samples"] = text
    quantized(small, tmp_path / "q", options)
    assert missed(tmp_path / "q", small) < 1.0  # of another model: 1.4


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("form", ["lapilli", "gemm"])
def test_tied_embeddings(tmp_path, text, form, rotate):
    source = make_llava(tmp_path / "tied", text_config(tie_word_embeddings=True)).path
    options = {"method": "gptq", "samples": text, "form": form, "rotate": rotate}
    quantized(str(source), tmp_path / "q", options)
    assert missed(tmp_path / "q", source) < 1.0
    assert answer(tmp_path / "q", PICTURE) is not None


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lapilli", "gemm", "llm-awq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_language_model_is_quantized_from_texts(tmp_path, text, form, dtype):
    source = plain_model(tmp_path / "text", dtype)
    options = {"method": "awq", "samples": text, "number": 3, "form": form}
    quantized(str(source), tmp_path / "q", options)
    assert missed(tmp_path / "q", source) < 1.0
    assert isinstance(answer(tmp_path / "q"), str)


def plain_model(path: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(text_config(**sizes)).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("form", ["gemm", "llm-awq", "lapilli"])
def test_layers_that_do_not_divide_stay_float_and_are_named(tmp_path, conversations, form):
    """A width of 48: only down_proj, of 64 inputs, has whole groups of 32."""
    source = make_oracle(tmp_path / "odd", next_=False, text="llama", tower="clip").path
    options = {"method": "awq", "samples": conversations, "form": form}
    said: list[str] = []
    quantized(str(source), tmp_path / "q", options, said, group_size=32)
    layers = packed_layers(tmp_path / "q")
    names = {name.split(".")[-1] for name in layers}
    if form == "lapilli":
        assert names >= {"q_proj", "down_proj", "lm_head"}
        assert not [line for line in said if "stays float" in line]
    else:
        assert names == {"down_proj"}
        assert "self_attn.q_proj stays float in every layer" in " ".join(said)
        assert "packs multiples of" in " ".join(said)
    assert answer(tmp_path / "q", PICTURE) is not None
    with pytest.raises(ConfigError, match="no linear layer fits into format gemm"):
        quantized(str(source), tmp_path / "x", {**options, "form": "gemm"}, group_size=128)
    assert [found.name for found in tmp_path.iterdir() if found.name.startswith(".")] == []


def test_a_model_without_llama_layers_is_refused(tmp_path, conversations):
    config = MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=260, max_seq_len=128)
    path = tmp_path / "llava-mpt"
    MptForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    with pytest.raises(LapilliError, match=r"Llama-shaped|mpt"):
        quantized(str(path), tmp_path / "q", {"samples": conversations})


def changed(source: str, target: Path, name: str, change: object) -> str:
    """A copy of a checkpoint with one tensor changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS)
    (found,) = [key for key in tensors if key.endswith(name)]
    change(tensors[found])  # type: ignore[operator]
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("method", ["gptq", "awq", "mbq"])
def test_weights_that_make_no_numbers_of_a_sample_are_refused(
    small, conversations, tmp_path, method
):
    bad = changed(small, tmp_path / "bad", UP, lambda weight: weight[3].fill_(1e38))
    with pytest.raises(ConfigError, match=r"layer 1 makes NaN or infinity of calibration sample 0"):
        quantized(bad, tmp_path / "q", {"method": method, "samples": conversations})
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(small, tmp_path, value):
    bad = changed(small, tmp_path / "bad", UP, lambda weight: weight[3].fill_(value))
    for method in ("rtn", "gptq"):
        with pytest.raises(CheckpointError, match=r"up_proj.* NaN or infinite"):
            quantized(bad, tmp_path / "q", {"method": method, "rotate": True})


def test_weights_beyond_the_scales_of_a_format_are_refused(small, tmp_path):
    bad = changed(small, tmp_path / "bad", UP, lambda weight: weight[3, 0].fill_(1e7))
    with pytest.raises(ConfigError, match="do not fit into 4 bits"):
        quantized(bad, tmp_path / "q", {"method": "rtn", "form": "gemm"})


@pytest.mark.parametrize("form", ["lapilli", "gemm"])
def test_what_is_quantized_already_is_refused(small, conversations, tmp_path, form):
    quantized(small, tmp_path / "once", {"method": "rtn", "form": form})
    with pytest.raises(LapilliError, match="quantized"):
        quantized(str(tmp_path / "once"), tmp_path / "twice", {"samples": conversations})


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"method": "best"}, {}, "method 'best' is unknown: choose rtn, gptq, awq, awq-clip, mbq"),
        ({"form": "marlin"}, {}, "format 'marlin' is unknown: choose lapilli, gemm, llm-awq"),
        ({"bits": 8}, {}, "bits must be 3 or 4 here, found 8"),
        ({"bits": 3, "form": "gemm"}, {}, "files of format gemm have 4 bits, found 3"),
        ({"bits": 3}, {"levels": "nonlinear"}, "3 bits have linear levels"),
        ({"number": 0}, {}, "samples must be 1 or more, found 0"),
        ({"device": "abacus"}, {}, "device 'abacus' is unknown"),
        ({"form": "gemm"}, {"levels": "symmetric"}, "zero points .* found levels 'symmetric'"),
        ({"form": "gemm"}, {"quantize_tower": True}, "have tower and logits in floats"),
        ({}, {"bits": 8}, "bits must be 4 in the configuration, found 8"),
    ],
)
def test_options_that_nothing_can_be_done_with(tmp_path, options, config, message):
    """Found before anything is read: there is no checkpoint here."""
    with pytest.raises(ConfigError, match=message):
        quantized(str(tmp_path / "none"), tmp_path / "q", options, **config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_target_with_the_name_of_an_embedded_model(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantized(small, Path("pebble"), {"method": "rtn", "rotate": True})
    assert len(packed_layers(tmp_path / "pebble")) == 3 * 7 + 1


def test_a_device_without_numbers(small, tmp_path):
    with pytest.raises(ConfigError, match="'meta' keeps no numbers"):
        quantized(small, tmp_path / "q", {"method": "gptq", "device": "meta"})


def test_pictures_may_lie_elsewhere(small, tmp_path):
    path = write_conversations(tmp_path)
    (tmp_path / "data").mkdir()
    path = path.rename(tmp_path / "data" / path.name)
    options = {"method": "gptq", "samples": str(path)}
    with pytest.raises(LapilliError, match=r"0\.png"):
        quantized(small, tmp_path / "q", options)
    reports = quantized(small, tmp_path / "q", {**options, "images": str(tmp_path)})
    assert len(reports) == 3


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="there is no CUDA device"):
        quantized(str(tmp_path / "none"), tmp_path / "q", {"device": "cuda"})


def test_a_source_is_replaced_by_its_quantized_self(small, conversations, tmp_path):
    shutil.copytree(small, tmp_path / "model")
    options = {"method": "gptq", "samples": conversations}
    with pytest.raises(CheckpointError, match="is there already"):
        quantized(str(tmp_path / "model"), tmp_path / "model", options)
    quantized(str(tmp_path / "model"), tmp_path / "model", options, overwrite=True)
    assert missed(tmp_path / "model", small) < 1.0
    assert [found.name for found in tmp_path.iterdir()] == ["model"]


def test_a_source_inside_of_the_target_is_not_overwritten(small, conversations, tmp_path):
    target = tmp_path / "all"
    shutil.copytree(small, target)
    shutil.copytree(small, target / "inner")
    with pytest.raises(CheckpointError, match="no checkpoint alone"):
        quantized(str(target / "inner"), target, {"samples": conversations}, overwrite=True)
    assert (target / "inner" / WEIGHTS).is_file()


def test_fewer_samples_than_asked_for_are_all_taken_and_it_is_said(small, tmp_path):
    file = write_conversations(tmp_path, 2)
    said: list[str] = []
    quantized(small, tmp_path / "q", {"samples": str(file), "number": 5}, said)
    assert f"{file} has 2 samples, fewer than 5" in said


def test_mbq_needs_pictures(small, tmp_path):
    file = write_conversations(tmp_path, pictures=False)
    with pytest.raises(ConfigError, match=r"no calibration sample of 4 from .* has a picture"):
        quantized(small, tmp_path / "q", {"method": "mbq", "samples": str(file)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 1}, "one built-in sample is a text: ask for 2 samples or more"),
        ({"number": 1, "samples": "mixed.jsonl"}, r"no calibration sample of 1 from .*mixed.jsonl"),
    ],
)
def test_mbq_says_where_pictures_could_come_from(small, tmp_path, options, message):
    file = write_conversations(tmp_path, 2)
    first, second = file.read_text("utf-8").splitlines()
    lines = [
        re.sub(r'<image>\\n|"image": ".*?", |, "image": "[^"]*"', "", one)
        for one in (first, second)
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if "samples" in options:
        options = {**options, "samples": tmp_path / str(options["samples"])}
    with pytest.raises(ConfigError, match=message):
        quantized(small, tmp_path / "q", {"method": "mbq", **options})


def test_a_model_of_text_alone_has_no_tower_and_no_pictures(tmp_path, text):
    source = str(plain_model(tmp_path / "text"))
    with pytest.raises(ConfigError, match="the model reads text only: choose awq"):
        quantized(source, tmp_path / "q", {"method": "mbq", "samples": text})
    for options in ({"method": "gptq", "samples": text, "number": 1}, {"method": "rtn"}):
        said: list[str] = []
        quantized(source, tmp_path / "q", options, said, overwrite=True, quantize_tower=True)
        assert [line for line in said if "no vision tower, and quantize_tower" in line] == said[:1]


def test_places_may_be_texts_or_paths(small, conversations, tmp_path):
    places = [tmp_path / "path", str(tmp_path / "text")]
    for target, samples in zip(places, (conversations, Path(conversations)), strict=True):
        options = CalibrationOptions(method="gptq", samples=samples, number=2)
        quantize_from_samples(small, target, QuantConfig(), options)
    written = [(Path(place) / "quantization.json").read_text("utf-8") for place in places]
    kept = [json.loads(one)["options"] for one in written]
    assert kept[0] == kept[1]


def test_mbq_needs_answers(small, tmp_path):
    file = write_conversations(tmp_path)
    lines = re.sub(r', \{"from": "gpt".*?\}', "", file.read_text("utf-8"))
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(LapilliError, match=r"supervised|answer"):
        quantized(small, tmp_path / "q", {"method": "mbq", "samples": str(file)})


def live_bytes() -> int:
    """The bytes of all tensors that something refers to, mapped files included."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and not found.is_meta:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("method", ["rtn", "gptq", SLOW[0]])
def test_no_float_layer_stays_behind(tmp_path, text, method):
    """What is kept of a layer that is done is its packed weights."""
    source = plain_model(tmp_path / "deep", num_hidden_layers=6)
    kept: list[int] = []

    class Counting(list[str]):
        def append(self, line: str) -> None:
            if line.startswith("layer "):
                kept.append(live_bytes())

    options = {"method": method, "rotate": True, "number": 2}
    options |= {} if method == "rtn" else {"samples": text}
    quantized(str(source), tmp_path / "q", options, Counting())
    assert len(kept) == 6
    of_a_layer = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    assert (kept[-1] - kept[1]) / 4 < of_a_layer / 4  # packed: a seventh of the floats
