"""What a stage leaves is read by our loader, the original's names, transformers and peft."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.write.huggingface import save_hf
from lapilli.compat import training
from lapilli.compat.builder import load_pretrained_model
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.geometry import ImageSize
from lapilli.lora import adapter_tensors
from lapilli.modality.image.pixels import PreparedImage
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.quant import QuantConfig
from lapilli.train.build import Joint, build_llava
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SaveRecipe,
)
from lapilli.train.results import Results, save_results
from lapilli.train.stages import choose_trainable, load_projector
from tests.integration.oracle import make_oracle
from tests.train.parts import Parts

IDS = [1, 50, 60, 70]
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
PATCHES = 4
LORA = LoraRecipe(rank=4, alpha=6.0, dropout=0.1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return Parts(tmp_path_factory.mktemp("parts"), torch.float32, rows=260)


@pytest.fixture(scope="module")
def llava(parts, tmp_path_factory):
    """A fresh LLaVA, original layout, its tower beside."""
    path = tmp_path_factory.mktemp("start") / "start"
    build_llava(*parts("llama", "clip"), path, joint=Joint(aspect="square"))
    return path


@pytest.fixture(scope="module")
def hf_llava(llava, tmp_path_factory):
    """The same in the layout of Hugging Face."""
    path = tmp_path_factory.mktemp("hf") / "start"
    loaded = load(llava)
    save_hf(
        path,
        loaded.model,
        loaded.config,
        tokenizer=loaded.tokenizer,
        tokenizer_path=loaded.tokenizer_path,
        template="vicuna_v1",
    )
    return path


def load(path, **options):
    return load_checkpoint(path, device="cpu", dtype="float32", **options)


def recipe_of(checkpoint, stage="instruct", *, save=None, **more):
    model = ModelRecipe(checkpoint=str(checkpoint), **more.pop("model", {}))
    return Recipe(
        stage=stage,
        optim=OptimRecipe(lr=1e-3),
        run=RunRecipe(batch_size=1, steps=1),
        model=model,
        save=save or SaveRecipe(),
        **more,
    )


def trained(recipe):
    """A model as after some steps: everything that the recipe trains has moved."""
    loaded = load(recipe.model.checkpoint, adapter=recipe.model.adapter, merge_lora=False)
    choose_trainable(loaded.model, recipe)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise)
    return loaded


def finished(recipe, folder, **options):
    loaded = trained(recipe)
    save_results(folder, loaded.model, Results.of(loaded, recipe), **options)
    return loaded


def logits_of(model):
    """Of a row with a picture, from our model."""
    model.eval()
    prompt = EncodedPrompt(
        [IDS[0], *[0] * PATCHES, *IDS[1:]],
        [False] * (len(IDS) + PATCHES),
        (Span(0, 1, PATCHES),),
    )
    picture = PreparedImage(PIXELS, ImageSize(28, 28))
    with torch.inference_mode():
        return model.logits(model(model.embed_prompts([prompt], [[picture]])))[0]


def same(one, other, atol=1e-5):
    rows = min(one.shape[-1], other.shape[-1])
    torch.testing.assert_close(one[..., :rows], other[..., :rows], atol=atol, rtol=0)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.slow
def test_align_leaves_a_projector(llava, parts, tmp_path):
    out = tmp_path / "out"
    loaded = finished(recipe_of(llava, "align", data=DataRecipe(template="plain")), out)
    assert {"config.json", "mm_projector.bin"} | TOKENIZER <= names_in(out)
    assert "model.safetensors" not in names_in(out)
    again = load(out)
    same(logits_of(again.model), logits_of(loaded.model))
    assert again.template.template.name == "vicuna_v1"
    weights = torch.load(out / "mm_projector.bin", weights_only=True)
    assert set(weights) == {
        f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    fresh = load(llava)
    load_projector(fresh.model, out)
    same(logits_of(fresh.model), logits_of(loaded.model))
    # The original's second stage: --pretrain_mm_mlp_adapter over the plain parts.
    base, eyes = parts("llama", "clip")
    given = {
        "model_name_or_path": base,
        "vision_tower": eyes,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "pretrain_mm_mlp_adapter": out / "mm_projector.bin",
        "data_path": "none.json",
        "output_dir": tmp_path / "unused",
    }
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    parsed = training.parse_arguments(options)
    training.stage(tmp_path / "staged", parsed, training.starting_config(parsed))
    same(logits_of(load(tmp_path / "staged").model), logits_of(loaded.model))


def test_align_with_several_tiles_keeps_the_end_of_a_row(parts, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    base, eyes = parts("llama", "clip")
    build_llava(base, eyes, start, joint=Joint(aspect="anyres"))
    loaded = finished(recipe_of(start, "align"), out)
    name = "modalities.image.image_newline"
    for again in (load(out), load(out, base=base)):  # over the start, and over the plain base
        assert torch.equal(again.model.state_dict()[name], loaded.model.state_dict()[name])


def test_instruct_leaves_a_whole_checkpoint(llava, tmp_path):
    out = tmp_path / "out"
    loaded = finished(recipe_of(llava, data=DataRecipe(template="llava_v1")), out)
    again = load(out)
    same(logits_of(again.model), logits_of(loaded.model))
    assert again.template.template.name == "llava_v1"
    assert {"model.safetensors", "config.json", "vision_tower"} | TOKENIZER <= names_in(out)


def test_save_dtype_is_the_dtype_of_the_files(llava, tmp_path):
    finished(recipe_of(llava, save=SaveRecipe(dtype="bfloat16")), tmp_path / "out")
    assert load(tmp_path / "out").config.torch_dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"save\.dtype is 'int8': choose from"):
        finished(recipe_of(llava, save=SaveRecipe(dtype="int8")), tmp_path / "other")


@pytest.mark.slow
def test_lora_leaves_an_adapter_and_its_projector(llava, parts, tmp_path):
    out = tmp_path / "llava-lora"
    loaded = finished(recipe_of(llava, lora=LORA), out)
    expected = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "non_lora_trainables.bin",
    }
    assert expected | TOKENIZER <= names_in(out)
    assert "model.safetensors" not in names_in(out)
    base, _ = parts("llama", "clip")
    logits = logits_of(loaded.model)
    same(logits_of(load(out).model), logits)  # the base by the name that is written
    same(logits_of(load(out, base=base).model), logits)  # over the plain language model
    same(logits_of(load(out, merge_lora=False).model), logits)
    beside = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert set(beside) == {
        f"base_model.model.model.mm_projector.{i}.{kind}"
        for i in (0, 2)
        for kind in ("weight", "bias")
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.1)
    layers = ["q", "k", "v", "o", "gate", "up", "down"]
    assert config["target_modules"] == sorted(f"{name}_proj" for name in layers)
    # The original's loader, by its own names.
    _, model, _, _ = load_pretrained_model(str(out), base, "llava-lora", device="cpu")
    ids = torch.tensor([[IDS[0], -200, *IDS[1:]]])
    with torch.no_grad():
        found = model(ids, images=PIXELS).logits[0]
    same(found, logits, atol=2e-2)  # it rounds to float16


def test_an_adapter_on_some_layers_says_which(llava, tmp_path):
    targets = ("language_model.model.layers.1.self_attn.{q,v}_proj",)
    recipe = recipe_of(llava, lora=replace(LORA, targets=targets))
    loaded = finished(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.1.self_attn.{n}_proj" for n in "qv"]
    same(logits_of(load(tmp_path / "out").model), logits_of(loaded.model))


def test_a_frozen_projector_of_another_run_is_not_lost(llava, tmp_path):
    recipe = recipe_of(llava, lora=LORA)
    loaded = trained(recipe)
    loaded.model.modalities["image"].projector.requires_grad_(False)
    save_results(tmp_path / "out", loaded.model, Results.of(loaded, recipe))
    same(logits_of(load(tmp_path / "out").model), logits_of(loaded.model))


def test_a_base_in_four_bits_is_not_written(llava, tmp_path):
    packed = QuantConfig(bits=4, group_size=32)
    recipe = recipe_of(llava, lora=replace(LORA, base="int4"))
    loaded = load(llava, merge_lora=False, quantization=packed)
    choose_trainable(loaded.model, recipe)
    out = tmp_path / "out"
    save_results(out, loaded.model, Results.of(loaded, recipe))
    assert "model.safetensors" not in names_in(out)
    again = load(out, merge_lora=False)
    ours, theirs = adapter_tensors(loaded.model), adapter_tensors(again.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        f"{n}_proj" for n in ["q", "k", "v", "o", "gate", "up", "down"]
    )


def test_lora_merged(llava, tmp_path):
    loaded = finished(recipe_of(llava, lora=LORA, save=SaveRecipe(merge=True)), tmp_path / "out")
    assert "model.safetensors" in names_in(tmp_path / "out")
    same(logits_of(load(tmp_path / "out").model), logits_of(loaded.model))
    halves = [name for name, _ in loaded.model.named_parameters() if ".lora_" in name]
    assert halves  # what is trained on is left alone


def test_averages_are_saved_in_place_of_the_models_weights(llava, tmp_path):
    recipe = recipe_of(llava, lora=LORA, save=SaveRecipe(merge=True))
    loaded = trained(recipe)
    averages = {name: t.detach() * 0.9 for name, t in loaded.model.state_dict().items()}
    save_results(tmp_path / "out", loaded.model, Results.of(loaded, recipe), state=averages)
    loaded.model.load_state_dict(averages)
    same(logits_of(load(tmp_path / "out").model), logits_of(loaded.model))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_tuned_tower_comes_along(llava, tmp_path, lora):
    recipe = recipe_of(llava, lora=lora, model={"tune_tower": True})
    loaded = finished(recipe, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.config.vision_in_checkpoint
    same(logits_of(again.model), logits_of(loaded.model))


@pytest.mark.slow
def test_an_adapter_goes_on(llava, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    finished(recipe_of(llava, lora=LORA), first)
    loaded = finished(recipe_of(first, lora=LORA), second)
    written = json.loads((second / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(llava.resolve())
    same(logits_of(load(second).model), logits_of(loaded.model))
    laid = finished(recipe_of(llava, lora=LORA, model={"adapter": str(first)}), tmp_path / "third")
    same(logits_of(load(tmp_path / "third").model), logits_of(laid.model))


@pytest.mark.slow
def test_results_over_a_projector_checkpoint_load_alike(llava, tmp_path):
    finished(recipe_of(llava, "align"), tmp_path / "projector")
    for name, lora in (("lora", LORA), ("whole", None)):
        loaded = finished(recipe_of(tmp_path / "projector", lora=lora), tmp_path / name)
        same(logits_of(load(tmp_path / name).model), logits_of(loaded.model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["align", "instruct", "lora"])
def test_a_tower_that_is_named_from_the_checkpoint_is_still_found(llava, tmp_path, kind):
    start = tmp_path / "start"
    shutil.copytree(llava, start)
    (start / "towers").mkdir()
    (start / "vision_tower").rename(start / "towers" / "clip")
    config = json.loads((start / "config.json").read_text()) | {"mm_vision_tower": "towers/clip"}
    (start / "config.json").write_text(json.dumps(config))
    lora = LORA if kind == "lora" else None
    recipe = recipe_of(start, "align" if kind == "align" else "instruct", lora=lora)
    loaded = finished(recipe, tmp_path / "out")
    same(logits_of(load(tmp_path / "out").model), logits_of(loaded.model))


HF = SaveRecipe(layout="huggingface")


def transformers_logits(model):
    ids = torch.tensor([[IDS[0], *[model.config.image_token_index] * PATCHES, *IDS[1:]]])
    with torch.inference_mode():
        return model.eval()(input_ids=ids, pixel_values=PIXELS).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_the_layout_of_hugging_face(llava, tmp_path, lora):
    save = replace(HF, merge=lora is not None)
    loaded = finished(recipe_of(llava, lora=lora, save=save), tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="float32")
    same(transformers_logits(model), logits_of(loaded.model))
    same(logits_of(load(tmp_path / "out").model), logits_of(loaded.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("targets", [(), ("language_model.model.layers.0.mlp.{up,down}_proj",)])
def test_an_adapter_for_peft(hf_llava, tmp_path, targets):
    import peft  # here: three seconds that only a run of these tests should pay

    out = tmp_path / "out"
    loaded = finished(recipe_of(hf_llava, lora=replace(LORA, targets=targets), save=HF), out)
    below = AutoModelForImageTextToText.from_pretrained(hf_llava, dtype="float32")
    model = peft.PeftModel.from_pretrained(below, str(out))
    same(transformers_logits(model), logits_of(loaded.model))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    ours = [name for name, _ in loaded.model.named_parameters() if "lora_A" in name]
    assert len(adapted) == len(ours)
    same(logits_of(load(out).model), logits_of(loaded.model))
    same(logits_of(load(hf_llava, adapter=str(out)).model), logits_of(loaded.model))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "instruct", "lora"])
def test_from_the_layout_of_hugging_face_into_the_originals(hf_llava, tmp_path, stage):
    lora = LORA if stage == "lora" else None
    recipe = recipe_of(hf_llava, "align" if stage == "align" else "instruct", lora=lora)
    loaded = finished(recipe, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.config.layout == "llava"
    same(logits_of(again.model), logits_of(loaded.model))


@pytest.mark.slow
def test_going_on_with_our_own_adapter_over_hugging_face(hf_llava, tmp_path):
    """The folder has the names of the original, its base those of Hugging Face."""
    first = finished(recipe_of(hf_llava, lora=LORA), tmp_path / "first")
    expected = logits_of(first.model)
    same(logits_of(load(tmp_path / "first").model), expected)
    same(logits_of(load(hf_llava, adapter=str(tmp_path / "first")).model), expected)
    recipe = recipe_of(hf_llava, lora=LORA, model={"adapter": str(tmp_path / "first")})
    second = finished(recipe, tmp_path / "second")
    assert (logits_of(second.model) - expected).abs().max() > 1e-2
    same(logits_of(load(tmp_path / "second").model), logits_of(second.model))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_whole_tensors_of_an_adapter_are_saved_with_the_next_one(hf_llava, tmp_path, tied):
    """An embedding that PEFT stored whole is not the base's: the next adapter brings it too."""
    import peft  # here: three seconds that only a run of these tests should pay

    base = tmp_path / "base"
    shutil.copytree(hf_llava, base)
    raw = json.loads((base / "config.json").read_text())
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = tied
    (base / "config.json").write_text(json.dumps(raw))
    if tied:
        tensors = load_file(base / "model.safetensors")
        kept = {name: one for name, one in tensors.items() if "lm_head" not in name}
        save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_pretrained(base, dtype="float32")
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 1.0
        model.save_pretrained(tmp_path / "first")
    recipe = recipe_of(base, lora=LORA, model={"adapter": str(tmp_path / "first")})
    second = finished(recipe, tmp_path / "second")
    same(logits_of(load(tmp_path / "second").model), logits_of(second.model))
    with pytest.raises(ConfigError, match=r"cannot carry language_model.* came with the adapter"):
        Results.of(second, replace(recipe, save=HF))


@pytest.mark.slow
def test_a_form_that_cannot_be_saved_is_refused_before_the_run(llava, hf_llava, parts, tmp_path):
    def results(checkpoint, **more):
        return Results.of(load(checkpoint), recipe_of(checkpoint, **more))

    with pytest.raises(ConfigError, match="PEFT needs the model in its own layout"):
        results(llava, lora=LORA, save=HF)
    on_tower = replace(LORA, targets=("*.{q,v}_proj",))
    with pytest.raises(
        ConfigError, match=r"cannot lie on modalities\.image\.vision_tower.*take the v"
    ):
        results(hf_llava, lora=on_tower, save=HF)
    results(hf_llava, lora=on_tower, save=replace(HF, merge=True))
    results(hf_llava, lora=on_tower)
    first = tmp_path / "first"
    make_oracle(first, next_=False, text="llama", tower="siglip")
    raw = json.loads((first / "config.json").read_text())
    raw["vision_feature_select_strategy"] = "default"
    (first / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        UnsupportedModelError, match="the original layout cannot leave out the first"
    ):
        results(first, lora=LORA)
    results(first, lora=LORA, save=HF)
    packed = replace(LORA, base="int4")
    with pytest.raises(ConfigError, match=r"save\.merge with lora.base 'int4'"):
        results(llava, lora=packed, save=SaveRecipe(merge=True))
    build_llava(*parts("mpt", "clip"), tmp_path / "mpt")
    with pytest.raises(UnsupportedModelError, match="no mpt language model"):
        results(tmp_path / "mpt", save=HF)
    build_llava(*parts("llama", "clip"), tmp_path / "pooled", joint=Joint(projector="resampler2"))
    with pytest.raises(UnsupportedModelError, match="projector 'resampler2'"):
        results(tmp_path / "pooled", save=HF)
    tuned = {"tune_tower": True}
    with pytest.raises(ConfigError, match="a PEFT adapter cannot carry a tuned vision tower"):
        results(hf_llava, lora=LORA, save=HF, model=tuned)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["mistral", "qwen2", "mpt"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_results_of_other_language_models_load_alike(parts, tmp_path, language, lora):
    start = tmp_path / "start"
    build_llava(*parts(language, "siglip"), start, joint=Joint(aspect="square"))
    loaded = finished(recipe_of(start, lora=lora), tmp_path / "out")
    same(logits_of(load(tmp_path / "out").model), logits_of(loaded.model))


def test_extra_files_are_saved_beside_the_results(llava, tmp_path):
    recipe = recipe_of(llava, "align")
    finished(recipe, tmp_path / "out", extra={"README.md": "A card.", "curve.png": b"\x89PNG"})
    assert (tmp_path / "out" / "README.md").read_text() == "A card."
    assert (tmp_path / "out" / "curve.png").read_bytes() == b"\x89PNG"
