"""Every recipe file is read, and its model is built and cut into what learns, without memory.

The models of 7B and 13B stand on torch's meta device: shapes, names and counts are real.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from lapilli.checkpoint.read.assemble import build_model
from lapilli.checkpoint.read.plan import make_plan
from lapilli.config.huggingface import parse_config
from lapilli.plan import A100, RTX4090, plan, usual_work
from lapilli.quant.nf4 import Nf4Linear
from lapilli.train.recipe import OptimRecipe, Recipe
from lapilli.train.recipe.file import load_recipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.optim import build_optimizer, parameter_groups

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
FILES = sorted(RECIPES.rglob("*.toml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]
SIZED = [name for name in NAMES if name.startswith("llava")]

# Published sizes: Vicuna 1.5 is Llama 2; the tower is CLIP ViT-L/14 at 336 pixels.
SIZES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PROJECTORS = {"7b": 20_979_712, "13b": 31_467_520}
WHOLE = {"7b": 6_738_415_616, "13b": 13_015_864_320}  # language models, head included


def config_of(size, *, aspect):
    """A LLaVA 1.5 or NeXT of the published sizes, from its config.json."""
    width, inner, layers, heads = SIZES[size]
    raw = {
        "model_type": "llava_llama",
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 4096,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": aspect,
    }
    if aspect == "anyres":
        raw |= {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    config, _ = parse_config(raw, tower=TOWER)
    return config


def read(name):
    """A recipe of a published size, and what its model is."""
    folder, _, stage = name.partition("/")
    size = "13b" if folder.endswith("13b") else "7b"
    is_next = folder == "llava_next" and stage != "align"
    recipe = load_recipe(RECIPES / f"{name}.toml")
    return recipe, config_of(size, aspect="anyres" if is_next else "pad")


@dataclass(frozen=True)
class Made:
    """A recipe of a published size, and its model with what it trains marked."""

    recipe: Recipe
    model: object
    trained: tuple[str, ...]

    @staticmethod
    @cache
    def of(name):
        recipe, config = read(name)
        # Packed in one piece: what has no memory needs no turns.
        with torch.device("meta"), patch("lapilli.quant.nf4._ROWS", 1 << 20):
            model = build_model(config)
            trained = choose_trainable(model, recipe)
        return Made(recipe, model, trained)

    def count(self, part=""):
        return sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and part in name
        )

    def rates(self):
        """Learning rate -> numbers that learn with it."""
        found = {}
        for group in parameter_groups(self.model, self.recipe.optim):
            size = sum(parameter.numel() for parameter in group["params"])
            found[group["lr"]] = found.get(group["lr"], 0) + size
        return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_published_recipe_is_read(path):
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    assert recipe.run.batch_size * recipe.run.gradient_accumulation_steps >= 1


def test_there_are_recipes_of_every_kind():
    assert {path.parent.name for path in FILES} >= {
        "llava15_7b",
        "llava15_13b",
        "llava_next",
        "tiny",
    }
    stages = {"align", "instruct", "lora", "task", "task_lora"}
    for size, more in (("7b", {"qlora"}), ("13b", set())):
        assert {path.stem for path in (RECIPES / f"llava15_{size}").iterdir()} == stages | more


@pytest.mark.parametrize("name", [name for name in SIZED if name.endswith("/align")])
def test_the_first_stage_trains_the_projector(name):
    made = Made.of(name)
    size = "13b" if "13b" in name else "7b"
    assert made.count() == PROJECTORS[size] == made.count("projector")
    assert made.rates() == {1e-3: PROJECTORS[size]}
    run = made.recipe.run
    assert (run.batch_size * run.gradient_accumulation_steps, run.epochs) == (256, 1.0)
    assert made.recipe.data.template == "plain"


@pytest.mark.parametrize(
    "name", [f"llava15_{size}/{stage}" for size in SIZES for stage in ("instruct", "task")]
)
def test_the_second_stage_trains_all_but_the_tower(name):
    made = Made.of(name)
    size = "13b" if "13b" in name else "7b"
    assert made.count("vision_tower") == 0
    assert made.count("projector") == PROJECTORS[size]
    assert made.count("language_model") == WHOLE[size]
    assert made.rates() == {2e-5: WHOLE[size] + PROJECTORS[size]}
    run = made.recipe.run
    assert run.batch_size * run.gradient_accumulation_steps == 128


LORA = [f"llava15_{size}/{stage}" for size in SIZES for stage in ("lora", "task_lora")]
SLOW_LORA = [*LORA[1:], "llava15_7b/qlora"]


@pytest.mark.parametrize(
    "name", [LORA[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LORA)]
)
def test_lora_trains_adapters_and_the_projector_at_their_own_rates(name):
    made = Made.of(name)
    size = "13b" if "13b" in name else "7b"
    width, inner, layers, _ = SIZES[size]
    rank = 128
    adapters = layers * rank * (4 * 2 * width + 3 * (width + inner))
    assert made.count(".lora_") == adapters
    assert made.rates() == {2e-4: adapters, 2e-5: PROJECTORS[size]}
    assert (made.recipe.lora.rank, made.recipe.lora.alpha) == (rank, 256.0)
    assert sum(".lora_A" in name for name in made.trained) == 7 * layers
    packed = sum(isinstance(module, Nf4Linear) for module in made.model.modules())
    assert packed == (7 * layers if name.endswith("qlora") else 0)
    run = made.recipe.run
    assert run.batch_size * run.gradient_accumulation_steps == 128


@pytest.mark.parametrize("name", SIZED)
def test_a_recipe_fits_eight_gpus(name):
    """The machine of the published runs; one of 24 GB is enough for 4 bits."""
    recipe, config = read(name)
    work = usual_work(recipe, config)
    assert plan(recipe, config, 8, gpu=A100, work=work).fits
    assert plan(recipe, config, 1, gpu=RTX4090, work=work).fits == name.endswith("qlora")


# LLaVA scripts/v1_5, which are of one mind, and the defaults of transformers' TrainingArguments.
SAME_OPTIM = {
    "name": "adamw",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "warmup_ratio": 0.03,
    "max_grad_norm": 1.0,
}
SAME_RUN = {
    "steps": 0,
    "epochs": 1.0,
    "precision": "bfloat16",
    "reduction": "llava",
    "gradient_checkpointing": True,
    "workers": 4,
    "seed": 42,
}
RATES = {"align": (1e-3, None), "whole": (2e-5, None), "lora": (2e-4, 2e-5)}  # projector_lr


def among(section, expected):
    return {name: getattr(section, name) for name in expected}


@pytest.mark.parametrize("name", SIZED)
def test_a_recipe_has_the_published_numbers(name):
    recipe = load_recipe(RECIPES / f"{name}.toml")
    stage = name.rpartition("/")[2]
    is_first, has_lora = stage == "align", stage.endswith("lora")
    lr, projector_lr = RATES["align" if is_first else "lora" if has_lora else "whole"]
    tower_lr, max_length = None, 2048
    if name == "llava_next/instruct":  # config.json of liuhaotian/llava-v1.6-vicuna-7b
        tower_lr, max_length = 2e-6, 4096
    expected = OptimRecipe(lr=lr, projector_lr=projector_lr, tower_lr=tower_lr, **SAME_OPTIM)
    assert recipe.optim == expected
    assert among(recipe.run, SAME_RUN) == SAME_RUN
    assert recipe.run.batch_size * recipe.run.gradient_accumulation_steps == (
        256 if is_first else 128
    )
    data = {
        "template": "plain" if is_first else "vicuna_v1",
        "group": "none" if is_first else "modality",
        "max_length": max_length,
        "held_out": 0.0,
        "pack": False,
        "placement": "front",
    }
    assert among(recipe.data, data) == data
    lora = {"rank": 128, "alpha": 256.0, "dropout": 0.05, "targets": ()} if has_lora else {}
    assert (recipe.lora is not None, among(recipe.lora, lora)) == (has_lora, lora)
    assert (recipe.noise.alpha, recipe.distill) == (0.0, None)


PUBLISHED_H = {
    "llava15_7b/align": 3.5,
    "llava15_7b/instruct": 10.0,
    "llava15_13b/align": 5.5,
    "llava15_13b/instruct": 20.0,
}


@pytest.mark.parametrize("name", PUBLISHED_H)
def test_the_plan_takes_about_the_published_time(repository, name):
    recipe, config = read(name)
    hours = plan(recipe, config, 8, gpu=A100, work=usual_work(recipe, config)).hours
    assert hours == pytest.approx(PUBLISHED_H[name], rel=0.2)
    guide = (repository / "docs" / "guide" / "cluster.md").read_text("utf-8")
    folder, _, stage = name.partition("/")
    size = folder.removeprefix("llava15_").upper()
    assert f"| {size}, {stage} | {PUBLISHED_H[name]:g} h | {hours:.1f} h |" in guide


def test_tiles_cost_what_the_guide_says(repository):
    recipe, config = read("llava_next/instruct")
    made = plan(recipe, config, 8, gpu=A100, work=usual_work(recipe, config))
    guide = (repository / "docs" / "guide" / "cluster.md").read_text("utf-8")
    assert f"`recipes/llava_next/instruct.toml` takes {made.hours:.1f} h on 8 x A100" in guide


@pytest.mark.parametrize("name", SIZED)
def test_pieces_are_where_the_scripts_have_zero_3_for_all_weights(name):
    recipe = load_recipe(RECIPES / f"{name}.toml")
    learns_all = recipe.stage == "instruct" and recipe.lora is None
    assert recipe.run.sharding == ("fsdp" if learns_all else "ddp")
    assert recipe.run.gradient_checkpointing


def test_next_tunes_the_tower_at_a_rate_of_its_own():
    made = Made.of("llava_next/instruct")
    tower = made.count("vision_tower")
    # 24 layers less the last, which the features do not pass; no last norm either.
    layer = 12 * 1024**2 + 13 * 1024
    embeddings = 1024 + 3 * 14 * 14 * 1024 + 577 * 1024 + 2 * 1024
    assert tower == 23 * layer + embeddings
    newline = 4096
    assert made.rates() == {2e-6: tower, 2e-5: WHOLE["7b"] + PROJECTORS["7b"] + newline}
    assert made.recipe.data.max_length == 4096
    run = made.recipe.run
    assert run.batch_size * run.gradient_accumulation_steps == 128


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZED)
def test_an_optimizer_takes_its_groups(name):
    made = Made.of(name)
    optimizer = build_optimizer(made.model, made.recipe.optim)
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == made.count()


@pytest.mark.parametrize("name", SIZED)
def test_every_number_has_a_source(name):
    """A comment stands beside every value that a script could have set."""
    lines = (RECIPES / f"{name}.toml").read_text().splitlines()
    section = ""
    for line in lines:
        if line.startswith("["):
            section = line
        if section in ("[optim]", "[run]", "[lora]") and "=" in line.partition("#")[0]:
            assert "#" in line, line


SMALL = [name for name in NAMES if name not in SIZED]


@pytest.mark.parametrize("name", SMALL)
def test_small_models_are_cut_into_what_learns(name):
    """The embedded model stands for those that a recipe of no size is given."""
    recipe = load_recipe(RECIPES / f"{name}.toml")
    with torch.device("meta"):
        model = build_model(make_plan("pebble", fetch=False).config)
        trained = choose_trainable(model, recipe)
    parts = {next(part for part in ("projector", "language_model") if part in n) for n in trained}
    assert parts == {"projector"} | ({"language_model"} if recipe.stage == "instruct" else set())
    optimizer = build_optimizer(model, recipe.optim)
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
