"""Recipes of pebble's stages: which keys each of them reads, and the recipes of the repository."""

import dataclasses
from pathlib import Path

import pytest
import torch

import lapilli.train
from lapilli.config.model import DecoderConfig, VisionConfig
from lapilli.errors import UnknownKeyError
from lapilli.lm import build_language_model
from lapilli.modality.image.image import VisionTransformer
from lapilli.train.recipe import OptimRecipe, RunRecipe
from pebble.recipe import PartsRecipe, PebbleRecipe, WorldRecipe, check_keys, load_recipe
from pebble.run import RECIPES
from tests.train.recipe.test_file import is_named, other

TRAIN = Path(lapilli.train.__file__).parent
READERS = [RECIPES.parent, TRAIN, *(TRAIN / room for room in ("trainer", "data", "distributed"))]
SECTIONS = {"optim": OptimRecipe, "run": RunRecipe, "model": PartsRecipe, "data": WorldRecipe}
KEYS = [f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in dataclasses.fields(kind)]
# With these a key of the trainer counts.
BESIDE = {
    "run.keep_best": {"run.evaluate_every": 2},
    "optim.decay_share": {"optim.schedule": "trapezoid"},
    "optim.decay": {"optim.weight_decay": 0.1},
}
OTHER = {
    "model.vision": {"hidden_size": 8},
    "model.text": {"hidden_size": 8},
    "data.questions": (1, 2),
}
# What nobody reads who trains parts on pictures that are drawn.
OF_WHOLE_MODELS = {
    "run.epochs", "run.compile", "run.gradient_checkpointing", "run.sharding", "run.exam",
    "optim.z_loss", "optim.tower_lr",
}  # fmt: skip
TALK = {"data.template", "data.questions", "data.long_share", "data.pointing", "optim.projector_lr"}
OF_ALL = {key for key in KEYS if key.startswith(("optim.", "run."))} - OF_WHOLE_MODELS - TALK
READ = {
    "tower": {"model.vision", "model.checkpoint", "data.num_pictures", "data.num_crowds"} | OF_ALL,
    "language": {"model.text", "data.num_pictures"} | TALK | OF_ALL,
    "align": {"data.num_pictures", "data.template", "optim.projector_lr"} | OF_ALL,
    "instruct": {"model.checkpoint", "model.text", "data.num_pictures"} | TALK | OF_ALL,
}


def recipe_with(stage, values):
    tables = {"optim": {"lr": 0.1}, "run": {"batch_size": 2, "steps": 2}}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    parts = {name: SECTIONS[name](**rest) for name, rest in tables.items()}
    return PebbleRecipe(stage=stage, **parts)


@pytest.mark.parametrize("stage", READ)
@pytest.mark.parametrize("key", KEYS)
def test_a_stage_takes_what_it_reads_and_refuses_the_rest_by_name(stage, key):
    recipe = recipe_with(
        stage, {**BESIDE.get(key, {}), key: OTHER.get(key) or other(key, SECTIONS)}
    )
    if key in READ[stage]:
        check_keys(recipe)
        assert is_named(key, READERS)
        return
    with pytest.raises(UnknownKeyError, match=f"^recipe key {key} is not read by stage '{stage}'"):
        check_keys(recipe)


def test_idle_keys_of_the_trainer_are_refused():
    with pytest.raises(UnknownKeyError, match=r"optim\.decay_share would change nothing"):
        check_keys(recipe_with("tower", {"optim.decay_share": 0.5}))


@pytest.mark.parametrize("section", ["noise", "lora", "distill", "save"])
def test_sections_of_whole_models_are_unknown(section, tmp_path):
    text = (RECIPES / "warm" / "4_instruct.toml").read_text()
    (tmp_path / "r.toml").write_text(f"{text}\n[{section}]\nx = 1\n")
    with pytest.raises(UnknownKeyError, match=f"recipe key {section} is unknown"):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_read_and_their_parts_are_built(path):
    recipe = load_recipe(path)
    parts = []
    with torch.device("meta"):
        if recipe.model.vision:
            parts.append(VisionTransformer(VisionConfig(**recipe.model.vision)))
        if recipe.model.text and recipe.model.checkpoint is None:
            parts.append(build_language_model(DecoderConfig(**recipe.model.text)))
    is_fresh = path.parent.name == "from_nothing" and path.stem in ("1_tower", "2_language")
    assert len(parts) == is_fresh
    assert all(sum(p.numel() for p in part.parameters()) > 1_000_000 for part in parts)
