"""What a run starts from: dtypes, an earlier projector, and templates that do not fit."""

import shutil
from pathlib import Path

import pytest
import torch

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.source import RESULTS
from lapilli.errors import (
    ConfigError,
    MissingFileError,
    MissingWeightsError,
    PromptError,
    ShapeMismatchError,
)
from lapilli.lora import adapter_tensors, adapters
from lapilli.prompt.choose import template_by_name
from lapilli.quant.linear import QuantLinear
from lapilli.train.data import SampleEncoder
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
from lapilli.train.stages import choose_trainable
from lapilli.train.start import choose_template, for_model, load_projector, load_start
from tests.checkpoint.conftest import llava  # noqa: F401  fixture
from tests.prompt.test_encode import with_sentinels
from tests.train.data.conftest import goldens  # noqa: F401  fixture
from tests.train.data.test_encoder import golden_sample


def recipe_of(checkpoint, stage="instruct", **given):
    sections = {"model": ModelRecipe(checkpoint=checkpoint), **given}
    run = RunRecipe(batch_size=1, precision=sections.pop("precision", "bfloat16"))
    return Recipe(stage=stage, optim=OptimRecipe(lr=1e-3), run=run, **sections)


LORA = LoraRecipe(rank=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "frozen"),
    [
        ({"lora": LORA}, torch.bfloat16),
        ({"stage": "align"}, torch.bfloat16),
        ({"lora": LORA, "precision": "float32"}, torch.float32),
        ({"lora": LORA, "save": SaveRecipe(merge=True)}, torch.float32),
        ({"stage": "align", "save": SaveRecipe(layout="huggingface")}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_frozen_weights_are_as_narrow_as_the_run_unless_they_are_saved(checkpoint, given, frozen):
    recipe = recipe_of(checkpoint, **given)
    model = load_start(recipe).model
    choose_trainable(model, recipe)
    learned = {p.dtype for p in model.parameters() if p.requires_grad}
    assert learned == {torch.float32}
    assert model.modality("image").vision_tower.vision_model.pre_layrnorm.weight.dtype == frozen


def test_a_tower_that_learns_is_read_in_float32(checkpoint):
    model = ModelRecipe(checkpoint=checkpoint, tune_tower=True)
    loaded = load_start(recipe_of(checkpoint, lora=LORA, model=model))
    dtypes = {n.startswith("language"): p.dtype for n, p in loaded.model.named_parameters()}
    assert dtypes == {True: torch.bfloat16, False: torch.float32}


def test_int4_packs_the_layers_under_the_adapter(llava):  # noqa: F811
    recipe = recipe_of(str(llava), lora=LoraRecipe(rank=2, base="int4"))
    model = load_start(recipe).model
    choose_trainable(model, recipe)
    found = [layer.base for _, layer in adapters(model)]
    assert len(found) == 14
    assert all(isinstance(base, QuantLinear) and base.bits == 4 for base in found)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_run_starts_with_the_projector_in_the_folder_of_another(checkpoint, tmp_path, lora):
    own = load_checkpoint(checkpoint).model.modality("image").projector
    drawn = {name: torch.randn_like(p, dtype=torch.float32) for name, p in own.named_parameters()}
    (tmp_path / RESULTS).mkdir()
    saved = {f"model.mm_projector.{name}": tensor for name, tensor in drawn.items()}
    torch.save(saved, tmp_path / RESULTS / "mm_projector.bin")
    model = ModelRecipe(checkpoint=checkpoint, projector=str(tmp_path))
    loaded = load_start(recipe_of(checkpoint, lora=lora, model=model))
    for name, parameter in loaded.model.modality("image").projector.named_parameters():
        assert torch.equal(parameter, drawn[name]), name


def test_a_run_goes_on_with_the_adapter_of_another(checkpoint, tmp_path):
    recipe = recipe_of(checkpoint, lora=LORA)
    first = load_start(recipe)
    choose_trainable(first.model, recipe)
    drawn = adapter_tensors(first.model)
    with torch.no_grad():
        for tensor in drawn.values():
            tensor.normal_()
    save_results(tmp_path, first.model, Results.of(first, recipe))
    model = ModelRecipe(checkpoint=checkpoint, adapter=str(tmp_path))
    recipe = recipe_of(checkpoint, lora=LORA, model=model)
    loaded = load_start(recipe).model
    choose_trainable(loaded, recipe)
    found = adapter_tensors(loaded)
    assert found.keys() == drawn.keys()
    assert all(torch.equal(found[name], drawn[name]) for name in drawn)
    assert all(tensor.requires_grad for tensor in found.values())


def test_a_projector_that_does_not_fit_is_refused(checkpoint, tmp_path):
    model = load_checkpoint(checkpoint, dtype="float32").model
    with pytest.raises(MissingFileError, match=r"no mm_projector\.safetensors or"):
        load_projector(model, tmp_path)
    own = dict(model.modality("image").projector.named_parameters())
    torch.save({"model.mm_projector.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(MissingWeightsError, match="another projector type"):
        load_projector(model, tmp_path)
    wrong = {f"mm_projector.{name}": torch.ones(3) for name in own}
    torch.save(wrong, tmp_path / "mm_projector.bin")
    with pytest.raises(ShapeMismatchError, match="another tower or language model"):
        load_projector(model, tmp_path)


@pytest.mark.parametrize(
    ("stage", "asked", "name"),
    [("align", "", "plain"), ("instruct", "", "llava_v1"), ("instruct", "llava_v0", "llava_v0")],
)
def test_the_template_is_that_of_the_stage_or_the_recipe(checkpoint, stage, asked, name):
    recipe = recipe_of(checkpoint, stage, data=DataRecipe(template=asked))
    assert choose_template(recipe, load_start(recipe)).name == name


def test_a_template_by_name_puts_the_checkpoints_tokens_around_a_picture(golden, goldens):  # noqa: F811
    """Against labels of the original under mm_use_im_start_end."""
    loaded = load_checkpoint(golden("llava-tiny-im-start-end")[1]["model_path"], dtype="float32")
    compared = 0
    for case in goldens.cases("_labels", "labels"):
        if not case["input"].get("im_start_end"):
            continue
        recipe = recipe_of("", data=DataRecipe(template=case["input"]["version"]))
        tokenizer = goldens.tokenizer(
            case["input"]["tokenizer"], [["<im_patch>"], ["<im_start>", "<im_end>"]]
        )
        sample = golden_sample(case)
        rows = SampleEncoder(tokenizer, choose_template(recipe, loaded), loaded.model)
        prompt = rows.encode_prompt(sample, [1] * len(sample.media))
        assert with_sentinels(prompt) == case["expect"]["input_ids"], case["id"]
        assert prompt.labels == case["expect"]["labels"], case["id"]
        compared += 1
    assert compared >= 3


def test_student_and_teacher_each_have_their_own_tokens_around_a_picture(checkpoint, golden):
    marked = load_checkpoint(golden("llava-tiny-im-start-end")[1]["model_path"], dtype="float32")
    bare, template = load_start(recipe_of(checkpoint)), template_by_name("vicuna_v1")
    assert for_model(template, marked).media_tokens == ("<im_start>", "<im_end>")
    assert for_model(for_model(template, marked), bare) == template


def test_a_template_of_another_base_is_refused(checkpoint):
    recipe = recipe_of(checkpoint, data=DataRecipe(template="chatml_direct"))
    with pytest.raises(ConfigError, match=r"ends turns with '<\|im_end\|>', which is no token"):
        choose_template(recipe, load_start(recipe))
    recipe = recipe_of(checkpoint, data=DataRecipe(template="nothing"))
    with pytest.raises(PromptError, match="no template is called 'nothing'"):
        choose_template(recipe, load_start(recipe))


@pytest.mark.slow
def test_a_template_that_contradicts_the_chat_template_beside_the_checkpoint_is_refused(
    checkpoint, tmp_path
):
    folder = tmp_path / Path(checkpoint).name
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text("{{ '[INST] <<SYS>>' }}")
    for asked in ("vicuna_v1", "llava_v0"):
        recipe = recipe_of(str(folder), data=DataRecipe(template=asked))
        with pytest.raises(
            ConfigError,
            match=rf"'{asked}' is wrong .* take 'llava_llama_2', or leave data\.template out: the "
            "checkpoint asks for 'llava_v1'",
        ):
            choose_template(recipe, load_start(recipe))
    for asked in ("", "llava_v1", "plain", "llava_llama_2"):  # its own, and what fits
        recipe = recipe_of(str(folder), data=DataRecipe(template=asked))
        assert choose_template(recipe, load_start(recipe)).name == (asked or "llava_v1")


def test_no_checkpoint_and_no_pictures_are_refused(golden):
    with pytest.raises(ConfigError, match=r"model\.checkpoint is missing"):
        load_start(recipe_of(None))
    base = str(golden("llava-v1.5-tiny-projector")[1]["model_base"])
    with pytest.raises(ConfigError, match="reads text only"):
        load_start(recipe_of(base))
