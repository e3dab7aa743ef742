"""Adapters beyond the golden ones: PEFT on Hugging Face models, mistral, vocabularies, towers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.read.plan import make_plan
from lapilli.errors import ConfigError, MissingWeightsError, UnsupportedModelError
from lapilli.geometry import ImageSize
from tests.checkpoint.test_hf import logits_of, make, theirs

# What peft says about itself and about the transformers of today.
of_peft = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def load(path, **options):
    return load_checkpoint(path, device="cpu", dtype="float32", **options)


def peft_adapter(path, adapter_path, **options):
    """A random PEFT adapter on a random Hugging Face LLaVA; their merged model."""
    import peft  # here: three seconds that only a run of these tests should pay

    model = make(path, "llama", "clip")
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(adapter_path)
    return wrapped.merge_and_unload().eval()


@pytest.mark.slow
@of_peft
@pytest.mark.parametrize("is_source", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*language_model.*\.(q|v)_proj"},
        {
            "target_modules": ["q_proj", "up_proj", "linear_2"],
            "modules_to_save": ["linear_1"],
            "use_rslora": True,
            "rank_pattern": {"up_proj": 2},
        },
    ],
    ids=["language", "everywhere"],
)
def test_peft_on_hugging_face(tmp_path, options, is_source):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    expected_model = peft_adapter(base, adapter, **options)
    options = {"base": str(base)} if is_source else {"adapter": str(adapter)}
    loaded = load(adapter if is_source else base, **options)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = theirs(expected_model, 4, pixel_values=pixels)
    ours = logits_of(loaded, pixels, ImageSize(28, 28), 4)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@of_peft
def test_two_adapters_are_refused(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    peft_adapter(base, adapter, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="is an adapter itself: merge it"):
        make_plan(adapter, base=str(base), adapter=str(adapter))


@of_peft
def test_adapter_for_other_modules(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    peft_adapter(base, adapter, target_modules=r".*language_model.*\.q_proj")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    strange = {
        name.replace("base_model.model.model", "base_model.model.gpt"): tensor
        for name, tensor in tensors.items()
    }
    save_file(strange, file)
    with pytest.raises(MissingWeightsError, match=r"4 tensors of the adapter .* no module"):
        load(base, adapter=str(adapter))
    save_file({"base_model.model.model.embed.lora_embedding_A": torch.zeros(1)}, file)
    with pytest.raises(UnsupportedModelError, match="lora_embedding_A, which is no LoRA of a lin"):
        load(base, adapter=str(adapter))


@pytest.fixture
def mistral_lora(conformance, maker, tmp_path):
    """The golden LoRA on a mistral base, which the original builds as llama."""
    spec = json.loads(
        next((conformance / "cases").glob("*/llava-v1.5-tiny-lora/spec.json")).read_text()
    )
    spec["lm"] |= {"arch": "mistral", "num_key_value_heads": 2, "sliding_window": 8}
    spec["lora"] |= {"format": "safetensors", "non_lora_prefix": ""}
    return maker.build(spec, str(tmp_path), None, str(conformance / "assets"))


def test_lora_on_mistral(mistral_lora):
    loaded = load(mistral_lora["model_path"], base=mistral_lora["model_base"])
    assert loaded.config.text.family == "mistral"
    assert loaded.config.text.sliding_window == 8
    lora = load_file(Path(mistral_lora["model_path"]) / "adapter_model.safetensors")
    base = torch.load(Path(mistral_lora["model_base"]) / "pytorch_model.bin", weights_only=True)
    module = "model.layers.1.self_attn.k_proj"
    a, b = (lora[f"base_model.model.{module}.lora_{half}.weight"].float() for half in "AB")
    expected = base[f"{module}.weight"].float() + 2.0 * b @ a
    found = loaded.model.state_dict()[f"language_model.{module}.weight"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "base_model.", "base_model.model."])
def test_what_was_trained_beside_a_lora_has_any_prefix(conformance, maker, tmp_path, prefix):
    spec = json.loads(
        next((conformance / "cases").glob("*/llava-v1.5-tiny-lora/spec.json")).read_text()
    )
    spec["lora"] |= {"non_lora_prefix": prefix}
    built = maker.build(spec, str(tmp_path), None, str(conformance / "assets"))
    loaded = load(built["model_path"], base=built["model_base"])
    stored = torch.load(Path(built["model_path"]) / "non_lora_trainables.bin", weights_only=True)
    found = loaded.model.state_dict()["modalities.image.projector.0.weight"]
    assert torch.equal(found, stored[f"{prefix}model.mm_projector.0.weight"].float())


@pytest.fixture
def projector(golden, tmp_path):
    """projector(changes of config.json, more tensors of mm_projector.bin) -> load options."""
    _, built, _ = golden("llava-v1.5-tiny-projector")
    source = Path(built["model_path"])

    def make_it(tensors=None, **changes):
        path = tmp_path / source.name
        shutil.copytree(source, path)
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))
        file = path / "mm_projector.bin"
        torch.save(torch.load(file, weights_only=True) | (tensors or {}), file)
        return {"source": path, "base": built["model_base"]}

    return make_it


EMBEDDING = "language_model.model.embed_tokens.weight"


def test_new_tokens_get_the_mean_of_all_rows(projector):
    options = projector(mm_use_im_start_end=True, mm_use_im_patch_token=True)
    loaded = load(options.pop("source"), **options)
    table = loaded.model.state_dict()[EMBEDDING]
    assert table.shape[0] == loaded.tokenizer.vocab_size == 1003
    mean = table[:1000].mean(dim=0)
    torch.testing.assert_close(table[1000:], mean.expand(3, -1), atol=1e-6, rtol=1e-6)
    assert loaded.model.language_model.lm_head.weight.shape[0] == 1003
    assert any("grown" in note and "1000 to 1003" in note for note in loaded.report.notes)


def test_trained_rows_of_new_tokens_are_the_last_ones(projector):
    rows = torch.full((2, 64), 0.25)
    options = projector(
        {"model.embed_tokens.weight": rows}, mm_use_im_start_end=True, mm_use_im_patch_token=False
    )
    table = load(options.pop("source"), **options).model.state_dict()[EMBEDDING]
    assert table.shape[0] == 1002
    assert torch.equal(table[1000:], rows)


def test_trained_table_replaces_the_base(projector):
    whole = torch.full((1002, 64), 0.5)
    options = projector(
        {"model.embed_tokens.weight": whole}, mm_use_im_start_end=True, mm_use_im_patch_token=False
    )
    table = load(options.pop("source"), **options).model.state_dict()[EMBEDDING]
    assert torch.equal(table, whole)


def test_base_named_by_the_config(projector, golden):
    _, built, _ = golden("llava-v1.5-tiny-projector")
    options = projector(_name_or_path=built["model_base"])
    assert str(make_plan(options["source"]).base_path) == built["model_base"]


def test_lora_on_a_llava_whose_image_part_is_another(golden, tmp_path):
    """The projector, newline and tower of the base give way to those of the adapter."""
    _, built, _ = golden("llava-v1.5-tiny-lora")
    alone = load(built["model_path"], base=built["model_base"])
    base = tmp_path / "llava-base"
    shutil.copytree(built["model_base"], base)
    file = base / "pytorch_model.bin"
    more = {
        "model.mm_projector.0.weight": torch.zeros(64, 32),
        "model.mm_projector.9.weight": torch.zeros(64, 32),
        "model.image_newline": torch.zeros(64),
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias": torch.ones(32),
    }
    torch.save(torch.load(file, weights_only=True) | more, file)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**raw, "model_type": "llava_llama"}))
    loaded = load(built["model_path"], base=str(base))
    first, second = alone.model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "model.image_newline" in loaded.report.dropped
