"""Declared modalities in the files: every layout, packed, exported, beside a base, and damaged."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapilli.checkpoint.export import export_checkpoint, save_loaded
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.checkpoint.load import load_checkpoint
from lapilli.config import modalities as table
from lapilli.config.modalities import register_kind
from lapilli.config.model import ModalityConfig, ProjectorConfig
from lapilli.errors import ConfigError, MissingWeightsError, UnsupportedModelError
from lapilli.modality.vector import VectorModality
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.quant.layerwise import decoder_of
from lapilli.quant.rotation import check_rotation
from lapilli.train.build import add_modalities
from tests.modality.declared import DECLARED, tiny_language_model

LAYOUTS = {"llava": "pebble", "hf_llava": "pebble", "text": "language"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every layout that declares one modality of each kind."""
    root = tmp_path_factory.mktemp("declared")
    plain = tiny_language_model(root / "plain")
    add_modalities(str(plain), root / "text", DECLARED, seed=3)
    add_modalities("pebble", root / "llava", DECLARED, seed=3)
    export_checkpoint(str(root / "llava"), root / "hf_llava", layout="huggingface")
    return {name: root / name for name in ("plain", *LAYOUTS)}


def tensors(loaded) -> dict[str, torch.Tensor]:
    return {n: t for n, t in loaded.model.state_dict().items() if "image" not in n}


def assert_equal_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_again_it_has_the_same_bits(checkpoints, layout, tmp_path):
    first = load_checkpoint(checkpoints[layout], device="cpu", dtype="stored")
    assert first.config.layout == layout
    assert [name for name, _ in first.config.modalities] == list(DECLARED)
    assert list(first.model.modalities) == [*(["image"] * (layout != "text")), *DECLARED]
    kept = "llava" if layout == "llava" else "huggingface"
    save_loaded(tmp_path / "again", first, layout=kept)
    again = load_checkpoint(tmp_path / "again", device="cpu", dtype="stored")
    assert again.config.modalities == first.config.modalities
    assert again.config.layout == layout
    assert_equal_bits(tensors(first), tensors(again))


@pytest.mark.parametrize(("source", "target"), [("llava", "hf_llava"), ("text", "llava")])
def test_layouts_hold_the_same_bits(checkpoints, source, target, tmp_path):
    layout = "huggingface" if target == "hf_llava" else "llava"
    export_checkpoint(str(checkpoints[source]), tmp_path / "out", layout=layout)
    first = load_checkpoint(checkpoints[source], device="cpu", dtype="stored")
    second = load_checkpoint(tmp_path / "out", device="cpu", dtype="stored")
    assert second.config.layout == target
    assert first.config.modalities == second.config.modalities
    for name, tensor in second.model.modalities.state_dict().items():
        assert torch.equal(tensor, first.model.modalities.state_dict()[name])


def test_names_in_the_files_are_the_same_in_every_layout(checkpoints):
    names = [
        {n for n in load_file(checkpoints[one] / "model.safetensors") if n.startswith("lapilli_")}
        for one in LAYOUTS
    ]
    assert names[0] == names[1] == names[2]
    assert "lapilli_modalities.vec.projector.0.weight" in names[0]
    assert "lapilli_modalities.user.encoder.tables.0.weight" in names[0]
    assert "lapilli_modalities.item.encoder.model.embed_tokens.weight" in names[0]


def test_the_same_seed_gives_the_same_weights(checkpoints, tmp_path):
    plain = str(checkpoints["plain"])
    add_modalities(plain, tmp_path / "same", DECLARED, seed=3)
    add_modalities(plain, tmp_path / "other", DECLARED, seed=4)
    same, other = (
        load_checkpoint(tmp_path / name, device="cpu").model.state_dict()
        for name in ("same", "other")
    )
    first = load_checkpoint(checkpoints["text"], device="cpu").model.state_dict()
    assert_equal_bits(first, same)
    assert not torch.equal(
        first["modalities.vec.projector.0.weight"], other["modalities.vec.projector.0.weight"]
    )


@pytest.mark.parametrize("quantize_tower", [False, True])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_packed_it_is_saved_and_loaded(checkpoints, bits, quantize_tower, tmp_path):
    first = load_checkpoint(
        checkpoints["text"], device="cpu", quantization=bits, quantize_tower=quantize_tower
    )
    save_loaded(tmp_path / "packed", first, quantization=first.quantization)
    second = load_checkpoint(tmp_path / "packed", device="cpu")
    assert_equal_bits(tensors(first), tensors(second))
    layers = [type(module).__name__ for module in second.model.modalities.modules()]
    assert ("QuantLinear" in layers) is quantize_tower
    item = second.model.modality("vec").prepare([1.0, 2.0, 3.0])
    [features] = second.model.modality("vec").embed([item])
    [expected] = first.model.modality("vec").embed([item])
    assert torch.equal(features, expected)


def test_inspect_names_them(checkpoints):
    found = inspect_checkpoint(checkpoints["llava"])
    assert found.modalities["vec"] == "(vector, width 3, projector mlp2x_gelu, tokens 2)"
    assert found.modalities["user"].startswith("(events, hidden_size 16, ")
    assert found.parameters["vec"] > 0
    assert not found.missing + found.unexpected + found.unknown_keys
    assert "modalities       user (events" in found.to_text()


def test_missing_weights_of_a_declared_modality(checkpoints, tmp_path):
    broken = shutil.copytree(checkpoints["text"], tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state.pop("lapilli_modalities.vec.projector.0.weight")
    save_file(state, broken / "model.safetensors")
    match = r"1 parameters have no tensor in the files: modalities\.vec\.projector\.0\.weight"
    with pytest.raises(MissingWeightsError, match=match):
        load_checkpoint(broken, device="cpu")


def test_weights_that_nothing_declares(checkpoints, tmp_path):
    broken = shutil.copytree(checkpoints["text"], tmp_path / "broken")
    raw = json.loads((broken / "config.json").read_text())
    del raw["lapilli_modalities"]["vec"]
    (broken / "config.json").write_text(json.dumps(raw))
    with pytest.raises(MissingWeightsError, match="of the files have no parameter: lapilli_"):
        load_checkpoint(broken, device="cpu")


def test_an_undeclared_modality_is_not_saved(checkpoints, tmp_path):
    loaded = load_checkpoint(checkpoints["text"], device="cpu")
    config = ProjectorConfig(
        kind="linear", vision_size=2, hidden_size=loaded.config.text.hidden_size
    )
    loaded.model.add_modality("sound", VectorModality(config, name="sound"))
    with pytest.raises(ConfigError, match="does not declare the modality 'sound'"):
        save_loaded(tmp_path / "out", loaded)


@dataclass(frozen=True, kw_only=True)
class LevelsConfig(ModalityConfig):
    kind: ClassVar[str] = "levels"
    window: int


def build_levels(config: LevelsConfig, *, name: str, hidden_size: int) -> VectorModality:
    projector = ProjectorConfig(kind="linear", vision_size=config.window, hidden_size=hidden_size)
    return VectorModality(projector, name=name)


def test_a_checkpoint_of_ones_own_kind(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_KINDS", dict(table._KINDS))
    register_kind(LevelsConfig, build_levels)
    given = {"sound": {"kind": "levels", "window": 7}}
    add_modalities(str(checkpoints["plain"]), tmp_path / "sound", given)
    loaded = load_checkpoint(tmp_path / "sound", device="cpu")
    assert loaded.config.modalities == (("sound", LevelsConfig(window=7)),)
    assert loaded.model.modality("sound").projector.in_features == 7
    monkeypatch.setattr(table, "_KINDS", {k: v for k, v in table._KINDS.items() if k != "levels"})
    with pytest.raises(UnsupportedModelError, match="the kind 'levels' of a modality is unknown"):
        load_checkpoint(tmp_path / "sound", device="cpu")


def test_what_builds_no_modality(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_KINDS", dict(table._KINDS))
    register_kind(LevelsConfig, lambda config, **_: torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="the kind 'levels' builds a Linear, expected a torch"):
        add_modalities(
            str(checkpoints["plain"]), tmp_path / "x", {"sound": {"kind": "levels", "window": 7}}
        )


def test_an_encoder_begins_as_a_language_model(checkpoints, tmp_path):
    plain = str(checkpoints["plain"])
    item = {"kind": "text", "from": plain, "tokens": 2}  # of the same width, so without a projector
    add_modalities(plain, tmp_path / "out", {"item": item})
    loaded = load_checkpoint(tmp_path / "out", device="cpu")
    encoder, lm = loaded.model.modality("item").encoder, loaded.model.language_model
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, lm.state_dict()[name])
    assert list(loaded.model.modality("item").projector.parameters()) == []


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "no modality is given"),
        ({"items": {"kind": "vector", "width": 3}}, "'items', which torch's ModuleDict has"),
        ({"user": {"kind": "vector"}}, r"user\.width is missing"),
        (
            {"user": {"kind": "vector", "width": 3, "projector": "identity"}},
            "'user': projector",
        ),
    ],
)
def test_what_cannot_be_added(checkpoints, given, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        add_modalities(str(checkpoints["plain"]), tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_a_foreign_family_declares_nothing(tmp_path):
    config = {"model_type": "phi", "architectures": ["PhiForCausalLM"]}
    config["lapilli_modalities"] = {"user": DECLARED["vec"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="declares the modality 'user', which only"):
        load_checkpoint(tmp_path, device="cpu")


def test_a_name_that_is_taken(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="a modality 'vec' already"):
        add_modalities(str(checkpoints["text"]), tmp_path / "out", {"vec": DECLARED["vec"]})


ATTENDED = {
    "user": {**DECLARED["user"], "fusion": "cross_attention", "every": 2},
    "vec": {**DECLARED["vec"], "fusion": "cross_attention", "every": 2},
    "item": DECLARED["item"],
}


@pytest.fixture(scope="module")
def attended(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of two layouts whose modalities stand beside the sequence, gates open."""
    root = tmp_path_factory.mktemp("attended")
    plain = tiny_language_model(root / "plain")
    for name, source in (("text", str(plain)), ("llava", "pebble")):
        add_modalities(source, root / f"{name}-shut", ATTENDED, seed=3)
        loaded = load_checkpoint(root / f"{name}-shut", device="cpu", dtype="stored")
        for path, parameter in loaded.model.named_parameters():
            if path.endswith("_gate"):
                parameter.data = torch.full_like(parameter, 0.5)
        layout = "llava" if name == "llava" else "huggingface"
        save_loaded(root / name, loaded, layout=layout)
    export_checkpoint(str(root / "llava"), root / "hf_llava", layout="huggingface")
    return {name: root / name for name in ("plain", "text-shut", *LAYOUTS)}


def hidden_of(path: Path, *, beside: bool = True, **options) -> torch.Tensor:
    model = load_checkpoint(path, device="cpu", **{"dtype": "float32", **options}).model
    prompt = EncodedPrompt([1, 5, 6, 7], [False] * 4, (Span(0, 2, 0, "vec"),) if beside else ())
    media = [model.modality("vec").prepare([1.0, 2.0, 3.0])] if beside else []
    with torch.inference_mode():
        return model(model.embed_prompts([prompt], [media]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_saved_in_every_layout(attended, layout, tmp_path):
    first = load_checkpoint(attended[layout], device="cpu", dtype="stored")
    assert first.config.layout == layout
    assert first.model.attended == {"user", "vec"}
    kept = "llava" if layout == "llava" else "huggingface"
    save_loaded(tmp_path / "again", first, layout=kept)
    again = load_checkpoint(tmp_path / "again", device="cpu", dtype="stored")
    assert again.config.modalities == first.config.modalities
    assert_equal_bits(tensors(first), tensors(again))
    names = load_file(tmp_path / "again" / "model.safetensors")
    assert names["lapilli_cross_attention.1.attention_gate"].item() == 0.5
    raw = json.loads((tmp_path / "again" / "config.json").read_text())["lapilli_modalities"]
    assert (raw["vec"]["fusion"], raw["vec"]["every"]) == ("cross_attention", 2)
    assert "fusion" not in raw["item"]


def test_both_layouts_compute_the_same(attended):
    found = hidden_of(attended["llava"])
    assert torch.equal(found, hidden_of(attended["hf_llava"]))
    assert not torch.allclose(found, hidden_of(attended["llava"], beside=False))


def test_fresh_blocks_change_no_bit(attended):
    model = load_checkpoint(attended["plain"], device="cpu", dtype="float32").model
    with torch.inference_mode():
        expected = model(model.embed_prompts([EncodedPrompt([1, 5, 6, 7], [False] * 4)]))
    assert torch.equal(hidden_of(attended["text-shut"]), expected)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_blocks_stay_float_among_packed_layers(attended, bits, tmp_path):
    first = load_checkpoint(attended["text"], device="cpu", quantization=bits)
    save_loaded(tmp_path / "packed", first, quantization=first.quantization)
    second = load_checkpoint(tmp_path / "packed", device="cpu")
    assert_equal_bits(tensors(first), tensors(second))
    kinds = {
        name: type(module).__name__
        for name, module in second.model.named_modules()
        if name.endswith(("1.q_proj", "1.self_attn.q_proj"))
    }
    assert kinds["language_model.model.layers.1.self_attn.q_proj"] == "QuantLinear"
    assert kinds["language_model.cross_attention.1.q_proj"] != "QuantLinear"
    found = hidden_of(tmp_path / "packed", dtype="auto")
    assert (
        torch.nn.functional.cosine_similarity(found, hidden_of(attended["text"]), dim=-1).min()
        > 0.9
    )
    packed = tmp_path / "packed-and-more"
    more = {"sensor": {"kind": "vector", "width": 2, "fusion": "cross_attention", "every": 2}}
    add_modalities(tmp_path / "packed", packed, more)
    assert load_checkpoint(packed, device="cpu").model.attended == {"user", "vec", "sensor"}


def test_inspect_tells_how_they_are_fused(attended):
    found = inspect_checkpoint(attended["llava"])
    assert found.modalities["vec"] == (
        "(vector, fusion cross_attention, every 2, width 3, projector mlp2x_gelu, tokens 2)"
    )
    plain = inspect_checkpoint("pebble")
    assert found.parameters["language model"] == plain.parameters["language model"]
    model = load_checkpoint(attended["llava"], device="cpu", dtype="stored").model
    blocks = model.get_submodule("language_model.cross_attention").parameters()
    assert found.parameters["cross-attention"] == sum(p.numel() for p in blocks)
    assert found.missing == found.unexpected == ()


VEC = {"kind": "vector", "width": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"v": {**VEC, "fusion": "late"}}, "fusion is 'late', expected tokens or cross_attention"),
        ({"v": {**VEC, "fusion": "cross_attention"}}, r"needs every: a block .* every = 2"),
        ({"v": {**VEC, "fusion": "cross_attention", "every": 0}}, "every is 0, expected 1 to"),
        ({"v": {**VEC, "fusion": "cross_attention", "every": 3}}, "has 2 layers: .* 1 to 2"),
        ({"v": {**VEC, "every": 2}}, "every is 2, and features that stand in the sequence have no"),
        (
            {
                "v": {**VEC, "fusion": "cross_attention", "every": 1},
                "w": {**VEC, "fusion": "cross_attention", "every": 2},
            },
            "share their blocks, .*'v' every = 1, 'w' every = 2: give all of them the same",
        ),
    ],
)
def test_half_of_a_fusion_is_refused(attended, settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        add_modalities(attended["plain"], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    raw = json.loads((attended["plain"] / "config.json").read_text())
    folder = shutil.copytree(attended["plain"], tmp_path / "declares")
    (folder / "config.json").write_text(json.dumps({**raw, "lapilli_modalities": settings}))
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(folder, device="cpu")


def test_a_packed_or_rotated_model_with_blocks_is_refused_where_it_would_be_wrong(attended):
    model = load_checkpoint(attended["text"], device="cpu", dtype="float32").model
    with pytest.raises(UnsupportedModelError, match="without the gated cross-attention"):
        decoder_of(model)
    with pytest.raises(ConfigError, match="gated cross-attention cannot be rotated"):
        check_rotation(model)
