"""Every key of a recipe, in every stage, is read or refused by its name."""

import dataclasses
import json
import sys
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from PIL import Image

import lapilli.train
from lapilli.errors import ConfigError, UnknownKeyError
from lapilli.train import card
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import launch
from lapilli.train.recipe import (
    DataRecipe,
    DistillRecipe,
    LoraRecipe,
    ModelRecipe,
    NoiseRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SaveRecipe,
    SourceRecipe,
)
from lapilli.train.recipe.checks import check_idle_keys, set_keys
from lapilli.train.recipe.file import load_recipe, recipe_text

SECTIONS = {
    "optim": OptimRecipe,
    "run": RunRecipe,
    "model": ModelRecipe,
    "data": DataRecipe,
    "lora": LoraRecipe,
    "noise": NoiseRecipe,
    "distill": DistillRecipe,
    "save": SaveRecipe,
}
KEYS = [f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in dataclasses.fields(kind)]
SOURCE = SourceRecipe(path="x.json")
# Values for keys whose neighbours have to go along, or whose type does not tell one.
VALUES = {
    "data.sources": (SOURCE,),
    "data.evaluation": (SOURCE,),
    "data.max_length": 64,
    "lora.targets": ("language_model.*",),
    "run.loggers": ("wandb",),
    "optim.betas": (0.5, 0.6),
    "run.epochs": 2.0,
    "model.freeze": ("modalities.image.projector.",),
}
# With these the key above counts.
BESIDE = {
    "run.keep_best": {"run.evaluate_every": 2, "data.held_out": 0.1},
    "run.evaluate_every": {"data.held_out": 0.1},
    "run.exam": {"data.held_out": 0.1},
    "optim.tower_lr": {"model.tune_tower": True},
    "optim.decay_share": {"optim.schedule": "trapezoid"},
    "optim.decay": {"optim.weight_decay": 0.1},
    "noise.on": {"noise.alpha": 1.0},
    "lora.double_quant": {"lora.base": "nf4"},
    "save.merge": {"lora.rank": 3},
    "distill.temperature": {"distill.teacher": "t"},
    "distill.weight": {"distill.teacher": "t"},
    "distill.hidden_weight": {"distill.teacher": "t"},
}
WHOLE = {"model.checkpoint": "pebble", "data.sources": (SOURCE,)}


def other(key, sections=SECTIONS):
    """A value that is not the key's default."""
    if key in VALUES:
        return VALUES[key]
    section, _, name = key.partition(".")
    hint = get_type_hints(sections[section])[name]
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if NoneType in get_args(hint):
        hint = kinds[0]
    default = next(f for f in dataclasses.fields(sections[section]) if f.name == name).default
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != default)
    return {bool: default is not True, str: "other", int: 3, float: 0.25}[hint]


def recipe_with(stage, values):
    """A recipe of these keys, made without a file."""
    tables = {"optim": {"lr": 0.1}, "run": {"batch_size": 2, "steps": 2}}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    if "distill" in tables:
        tables["distill"].setdefault("teacher", "t")
    return Recipe(stage=stage, **{name: SECTIONS[name](**rest) for name, rest in tables.items()})


@pytest.fixture(scope="module")
def reads(tmp_path_factory, checkpoint):
    """Keys that real runs of both stages of `lapilli train` read after their recipe was made."""
    folder = tmp_path_factory.mktemp("reads")
    Image.new("RGB", (40, 30), (200, 30, 60)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A stone."}]
    samples = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(4)]
    (folder / "train.json").write_text(json.dumps(samples))
    common = {
        "model.checkpoint": checkpoint,
        "data.sources": (SourceRecipe(path=str(folder / "train.json")),),
        "data.held_out": 0.25,
        "run.exam": 1,
        "run.evaluate_every": 1,
        "run.keep_best": True,
        "run.plot": False,
        "run.epochs": 1.5,
        "run.steps": 0,
        "noise.alpha": 1.0,
        "distill.teacher": checkpoint,
        "optim.weight_decay": 0.1,
    }
    tower = {"model.tune_tower": True, "optim.tower_lr": 1e-3, "optim.projector_lr": 1e-3}
    runs = {
        "align": {**common, **tower, "optim.schedule": "trapezoid"},
        "instruct": {**common, "lora.rank": 2, "lora.base": "nf4"},
        "whole": {**common, **tower, "optim.schedule": "trapezoid"},
    }
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "recipe_text", lambda *_args, **_options: "")
        for name, values in runs.items():
            stage = "align" if name == "align" else "instruct"
            recipe = recipe_with(stage, values)
            with recorded() as found:
                launch(recipe, folder / name, parallel=SINGLE_PROCESS)
            seen[stage] = seen.get(stage, set()) | found
    return seen


class recorded:  # noqa: N801  used like a function
    """Collects the keys that are read, other than by what reads all of them."""

    def __enter__(self):
        self.found = set()
        for section, kind in SECTIONS.items():
            kind.__getattribute__ = self.watching(section)
        return self.found

    def watching(self, section):
        def get(recipe, name):
            caller = Path(sys._getframe(1).f_code.co_filename).name
            if caller not in ("recipe_keys.py", "recipe_text.py", "recipe.py", "dataclasses.py"):
                self.found.add(f"{section}.{name}")
            return object.__getattribute__(recipe, name)

        return get

    def __exit__(self, *_error):
        for kind in SECTIONS.values():
            del kind.__getattribute__


# Read by the command itself, or where a run differs from those above.
ELSEWHERE = {"run.sharding", "lora.double_quant"}


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_what_a_run_accepts_it_reads(stage, key, reads):
    recipe = attempt(stage, key)
    if recipe is None:
        return
    if key in ELSEWHERE:
        assert is_named(key, [Path(lapilli.train.__file__).parent, Path(lapilli.__file__).parent])
    else:
        assert key in reads[stage]


def attempt(stage, key):
    """The recipe with this key in this stage; None, where it is refused by its name."""
    beside = BESIDE.get(key, {})
    refusal = ""
    try:
        recipe = recipe_with(stage, {**WHOLE, **beside, key: other(key)})
        assert key in [*set_keys(recipe), "optim.lr"]
        check_idle_keys(recipe)
    except ConfigError as error:
        refusal = str(error)
    if not refusal:
        return recipe
    sections = [f"[{one.partition('.')[0]}]" for one in (key, *beside)]
    assert any(one in refusal for one in (key, *sections, *beside)), refusal
    return None


def is_named(key, folders):
    """Whether a file names the key as an attribute."""
    name = "." + key.partition(".")[2]
    texts = (
        path.read_text()
        for folder in folders
        for path in folder.glob("**/*.py" if folder.name == "lapilli" else "*.py")
        if not path.name.startswith("recipe")
    )
    return any(name in text for text in texts)


# Of pebble's making, which is a program of its own (tests/pebble).
GONE = [
    *("model.vision", "model.text", "data.num_pictures", "data.num_crowds", "data.questions"),
    *("data.long_share", "data.pointing"),
]


@pytest.mark.parametrize("key", GONE)
def test_keys_of_pebbles_making_are_unknown(key, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(recipe_text(recipe_with("instruct", WHOLE), defaults=False))
    with pytest.raises(UnknownKeyError, match=f"^recipe key {key} is unknown"):
        load_recipe(path, [f"--{key}", "1"])


@pytest.mark.parametrize("stage", ["tower", "language"])
def test_stages_of_pebbles_making_are_unknown(stage, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(recipe_text(recipe_with("instruct", WHOLE), defaults=False))
    with pytest.raises(ConfigError, match=f"stage is '{stage}': expected one of align, instruct"):
        load_recipe(path, ["--stage", stage])


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize("key", [key for key in KEYS if key.startswith("data.")])
def test_every_key_of_the_data_can_be_set(stage, key):
    """data.alpha, which the guide tells of, was once refused by every stage."""
    assert attempt(stage, key) is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim.decay_share": 0.5}, "optim.decay_share would change nothing: optim.schedule is"),
        ({"optim.name": "sgd", "optim.eps": 1e-6}, "optim.eps would change nothing"),
        ({"optim.schedule": "constant", "optim.min_lr_ratio": 0.5}, "optim.min_lr_ratio would"),
        ({"optim.warmup_steps": 2, "optim.warmup_ratio": 0.5}, "optim.warmup_ratio would"),
        ({"optim.decay": "matrices"}, "optim.decay would change nothing"),
        ({"noise.on": "image"}, "noise.on would change nothing: noise.alpha is 0"),
        ({"run.evaluate_every": 2}, "run.evaluate_every would change nothing: nothing is held"),
        ({"run.exam": 2}, "run.exam would change nothing: nothing is held out"),
        ({"data.held_out": 0.1, "data.evaluation": (SOURCE,)}, "data.held_out would change"),
        ({"save.merge": True}, "save.merge would change nothing: there is no adapter"),
        ({"lora.rank": 2, "save.dtype": "float16"}, "save.dtype would change nothing"),
    ],
)
def test_keys_that_another_one_makes_idle_are_refused(values, message):
    with pytest.raises(UnknownKeyError, match=message):
        check_idle_keys(recipe_with("instruct", {**WHOLE, **values}))


@pytest.mark.parametrize("key", ["model.vision_tower", "model.language_model"])
def test_keys_without_a_reader_are_gone(key, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(recipe_text(recipe_with("instruct", WHOLE), defaults=False))
    with pytest.raises(UnknownKeyError, match=f"recipe key {key} is unknown"):
        load_recipe(path, [f"--{key}", "x"])


def test_a_recipe_that_is_made_in_python_is_looked_at_too(tmp_path):
    recipe = recipe_with("instruct", {**WHOLE, "noise.on": "image"})
    with pytest.raises(ConfigError, match=r"noise\.on would change nothing"):
        launch(recipe, tmp_path / "run", parallel=SINGLE_PROCESS)
