"""Recipes from TOML: keys are read or refused by name, and so are paths that lead nowhere."""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from PIL import Image

import lapilli.train
from lapilli.errors import CheckpointError, ConfigError, UnknownKeyError
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
from lapilli.train.recipe.file import (
    check_idle_keys,
    check_paths,
    load_recipe,
    recipe_text,
    set_keys,
)
from tests.train.conftest import new_recipe

ROOT = Path(__file__).parents[3]
SMALL = 'stage = "instruct"\n[optim]\nlr = 1\n[run]\nsteps = 3\nbatch_size = 2\n'


def written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_values_have_the_types_of_their_fields(tmp_path):
    recipe = load_recipe(written(tmp_path, SMALL.replace("[run]", "betas = [0, 0.5]\n[run]")))
    assert recipe.optim.lr == 1.0
    assert isinstance(recipe.optim.lr, float)
    assert recipe.optim.betas == (0.0, 0.5)
    assert recipe.optim.projector_lr is None


def test_overrides_are_laid_over_the_file(tmp_path):
    path = written(tmp_path, SMALL)
    options = ["--optim.lr", "2e-4", "--run.precision", "bfloat16", "--optim.betas", "[0.8, 0.9]"]
    recipe = load_recipe(path, options)
    assert recipe.optim.lr == 2e-4
    assert recipe.run.precision == "bfloat16"
    assert recipe.optim.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("[optim]\nlr = 1\nlearning = 2\n", UnknownKeyError, "optim.learning is unknown: .*lr"),
        ("extra = 1\n", UnknownKeyError, "recipe key extra is unknown"),
        ('[optim]\nlr = "fast"\n', ConfigError, "optim.lr is 'fast': expected a number"),
        ("[optim]\nlr = true\n", ConfigError, "optim.lr is True"),
        ("[optim]\n", ConfigError, "optim.lr is missing"),
        ("[optim]\nlr = -1\n", ConfigError, "optim.lr is -1"),
        ('[optim]\nlr = 1\nschedule = "step"\n', ConfigError, "schedule is 'step': .*cosine"),
        ("[optim]\nlr = 1\nbetas = [0.9]\n", ConfigError, "optim.betas is"),
        ("[optim]\nlr = 1\nbetas = 0.9\n", ConfigError, "a list .* of which each is a number"),
        ("optim = 3\n", ConfigError, "optim is 3: expected a table with lr, name"),
        (
            '[optim]\nlr = 1\nmax_grad_norm = "1"\n',
            ConfigError,
            "optim.max_grad_norm is '1': expected a number",
        ),
        ("[optim]\nlr = 1\nbatch_size = 2\n", UnknownKeyError, r"mean run\.batch_size\?"),
        ("[optim]\nlr = 1\nwarmup_step = 2\n", UnknownKeyError, r"mean optim\.warmup_steps\?"),
        ("[optim]\nlr = 1\n[lora]\n", ConfigError, "'align' trains the projector alone"),
        ("[optim]\nlr = 1\ntower_lr = 1\n", ConfigError, "the tower does not learn"),
        ("[optim\n", ConfigError, "not valid TOML"),
        ("", ConfigError, "recipe key optim.lr is missing"),
        ("[optimizer]\nlr = 1\n", UnknownKeyError, r"optimizer is unknown: did you mean optim\?"),
        ("[optim]\nlearning_rate = 1\n", UnknownKeyError, r"did you mean optim\.lr\?"),
        ("max_steps = 1\n", UnknownKeyError, r"did you mean run\.steps\?"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, change, kind, message):
    rest = "[run]\nsteps = 3\nbatch_size = 2\n"
    path = written(tmp_path, 'stage = "align"\n' + change + rest)
    with pytest.raises(kind, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--run.compile", "--run.seed", "1"],
            r"--run\.compile has no value: write --run\.compile V",
        ),
        (["--run.seed", "1", "--run.seed"], r"--run\.seed has no value"),
        (["--stage.name", "x"], "--stage.name: stage is 'instruct', no table"),
        (["--data.sources.path", "x"], r"sources is \[\{'path': 'a\.json'\}\], no table"),
        (
            ["--batch-size", "4"],
            r"recipe key batch-size is unknown: did you mean run\.batch_size\?",
        ),
        (["--data.sources", '[{"path": "x"}]'], "expected a list .* each is a table with path, im"),
    ],
)
def test_options_that_cannot_be_followed(tmp_path, options, message):
    path = written(tmp_path, SMALL + '[data]\nsources = [{path = "a.json"}]\n')
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, options)


def test_an_equals_sign_joins_as_well(tmp_path):
    options = ["--optim.lr=2e-4", '--data.sources=[{path = "a=b.json"}]', "--run.seed", "3"]
    recipe = load_recipe(written(tmp_path, SMALL), options)
    assert (recipe.optim.lr, recipe.run.seed) == (2e-4, 3)
    assert recipe.data.sources[0].path == "a=b.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"/nothing\.toml is not there"), (b"a = '\xff'", "not valid TOML")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "nothing.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_a_recipe_without_run_names_its_first_key(tmp_path):
    path = written(tmp_path, 'stage = "instruct"\n[optim]\nlr = 1\n')
    with pytest.raises(ConfigError, match=r"recipe key run\.batch_size is missing"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("optim.clip", "optim.max_grad_norm"),
        ("optim.warmup_share", "optim.warmup_ratio"),
        ("optim.final_share", "optim.min_lr_ratio"),
        ("run.accumulate", "run.gradient_accumulation_steps"),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(tmp_path, old, new):
    path = written(tmp_path, SMALL)
    with pytest.raises(UnknownKeyError, match=f"{old} is called {new} now"):
        load_recipe(path, [f"--{old}", "1"])
    load_recipe(path, [f"--{new}", "1"])


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="is a folder: expected a recipe"):
        load_recipe(tmp_path)


def test_a_byte_order_mark_is_not_read(tmp_path):
    (tmp_path / "recipe.toml").write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe(tmp_path / "recipe.toml").stage == "instruct"


def test_double_quantization_belongs_to_nf4(tmp_path):
    options = ["--lora.double_quant", "true", "--lora.base"]
    path = written(tmp_path, SMALL)
    assert load_recipe(path, [*options, "nf4"]).lora.double_quant
    with pytest.raises(ConfigError, match=r"lora\.double_quant .* lora\.base is 'int4'"):
        load_recipe(path, [*options, "int4"])


def test_options_without_value_or_dashes_are_refused(tmp_path):
    path = written(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=r"--optim.lr has no value"):
        load_recipe(path, ["--optim.lr"])
    with pytest.raises(ConfigError, match=r"expected --section\.key VALUE"):
        load_recipe(path, ["lr", "1"])


HARM = {
    "above 0": [("optim.max_grad_norm", "0 -1 nan")],
    "a number above 0": [("optim.lr", "0 nan inf"), ("optim.eps", "0 nan"), ("lora.alpha", "0 -1")],
    "at least 1": [
        ("run.save_every", "0"),
        ("run.threads", "0"),
        ("data.max_length", "0"),
        ("lora.rank", "0"),
    ],
    "0 or more": [
        ("optim.weight_decay", "-0.1 nan"),
        ("optim.projector_lr", "-1"),
        ("optim.warmup_steps", "-1"),
        ("optim.z_loss", "-1"),
        ("run.seed", "-1"),
        ("run.evaluate_every", "-1"),
        ("run.workers", "-1"),
        ("noise.alpha", "-5.0"),
        ("distill.hidden_weight", "-1"),
    ],
    "0 to 1": [("optim.min_lr_ratio", "-0.1 1.1 nan"), ("distill.weight", "1.5")],
    "at least 0 and below 1": [
        ("data.held_out", "1 -0.1"),
        ("lora.dropout", "1 -0.1"),
        ("optim.ema", "1"),
    ],
    "two numbers of at least 0 and below 1": [("optim.betas", "[0.9,1] [-0.1,0.9]")],
}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (key, value, expected)
        for expected, keys in HARM.items()
        for key, values in keys
        for value in values.split()
    ],
)
def test_values_that_do_harm_are_refused(tmp_path, key, value, expected):
    path = written(tmp_path, SMALL + '[distill]\nteacher = "t"\n')
    with pytest.raises(ConfigError, match=rf"^{key} is .*: expected {expected}( \(inf|$)"):
        load_recipe(path, [f"--{key}", value])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.max_grad_norm", "inf"),
        ("optim.betas", "[0, 0]"),
        ("optim.min_lr_ratio", "1"),
        ("optim.projector_lr", "0"),
        ("lora.dropout", "0"),
        ("run.threads", "1"),
        ("data.max_length", "1"),
    ],
)
def test_values_at_the_edge_of_their_range_are_accepted(tmp_path, key, value):
    load_recipe(written(tmp_path, SMALL), [f"--{key}", value])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_file_is_followed(path):
    run = load_recipe(path).run
    assert run.steps >= 1 or run.epochs > 0


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
    "data.stores": {"item": "a folder"},
    "data.sources": (SOURCE,),
    "data.evaluation": (SOURCE,),
    "data.max_length": 64,
    "lora.targets": ("language_model.*",),
    "run.loggers": ("wandb",),
    "optim.betas": (0.5, 0.6),
    "run.epochs": 2.0,
    "model.freeze": ("modalities.image.projector.",),
    "model.tune_encoder": ("user",),
    "model.modalities": {"user": {"kind": "vector", "width": 4}},
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


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a folder of recipes in it."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(*, path="data.json", images=None, distill=None, **model):
    data = DataRecipe(sources=(SourceRecipe(path=path, images=images),))
    return replace(new_recipe(), model=ModelRecipe(**model), data=data, distill=distill)


def test_what_is_there_is_taken_from_the_working_directory(here):
    (here / "data.json").touch()
    (here / "pictures").mkdir()
    recipe = recipe_of(
        images=str(here / "pictures"), checkpoint="pebble", projector="pictures",
        adapter="owner/lora", distill=DistillRecipe(teacher="owner/llava@main"),
    )  # fmt: skip
    check_paths(recipe, here / "recipes" / "a.toml")


@pytest.mark.parametrize("is_link", [False, True])
def test_what_the_results_could_not_name_is_refused(here, is_link):
    odd = here / "odd\udcff"
    odd.mkdir()
    (odd / "data.json").touch()
    (here / "link").symlink_to(odd)
    name = "link" if is_link else str(odd)
    with pytest.raises(ConfigError, match=r"^recipe key model.checkpoint is .*odd.*no UTF-8"):
        check_paths(recipe_of(checkpoint=name), here / "a.toml")
    data = recipe_of(path=f"{name}/data.json", images=name)
    if is_link:
        check_paths(data, here / "a.toml")
        return
    with pytest.raises(ConfigError, match=r"^recipe key data.sources\[0\].path is .*no UTF-8"):
        check_paths(data, here / "a.toml")


def test_a_folder_is_no_file_of_data(here):
    expected = rf"path is 'recipes', and {here}/recipes is a folder: name a \.json, .* file in it$"
    with pytest.raises(ConfigError, match=expected):
        check_paths(recipe_of(path="recipes"), here / "a.toml")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"path": "other.jsonl"}, r"data\.sources\[0\]\.path is 'other\.jsonl'"),
        ({"path": "s{0..1}.tar"}, r"data\.sources\[0\]\.path is 's\{0\.\.1\}\.tar'"),
        ({"images": "pictures"}, r"data\.sources\[0\]\.images is 'pictures'"),
        ({"projector": "runs/align"}, r"model\.projector is 'runs/align'"),
        ({"checkpoint": "./llava"}, r"model\.checkpoint is '\./llava'"),
        ({"adapter": "a/b/c"}, r"model\.adapter is 'a/b/c'"),
        ({"distill": DistillRecipe(teacher="a/b/c")}, r"distill\.teacher is 'a/b/c'"),
    ],
)
def test_the_absolute_path_that_is_missing_is_named(here, change, key):
    (here / "data.json").touch()
    with pytest.raises(ConfigError, match=rf"{key}, and there is no {here}/.*is started$"):
        check_paths(recipe_of(**change), here / "recipes" / "a.toml")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"path": "train.jsonl"}, "train.jsonl"),
        (
            {"checkpoint": "checkpoints/llava"},
            "checkpoints/llava",
        ),  # a hub id, if it is nothing else
    ],
)
def test_what_lies_beside_the_recipe_is_pointed_at(here, change, name):
    (here / "data.json").touch()
    place = here / "recipes" / name
    place.parent.mkdir(exist_ok=True)
    place.touch() if place.suffix else place.mkdir()
    with pytest.raises(ConfigError, match=rf"{place} is there: write that, or start in"):
        check_paths(recipe_of(**change), here.joinpath("recipes", "a.toml").relative_to(here))


def test_evaluation_is_looked_for_and_a_file_is_no_checkpoint(here):
    (here / "data.json").touch()
    recipe = recipe_of()
    data = replace(recipe.data, evaluation=(SourceRecipe(path="held.json"),))
    with pytest.raises(ConfigError, match=r"data\.evaluation\[0\]\.path"):
        check_paths(replace(recipe, data=data), here / "a.toml")
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        check_paths(recipe_of(checkpoint="data.json"), here / "a.toml")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a device of Linux")
def test_a_recipe_without_an_end():
    with pytest.raises(ConfigError, match="/dev/zero has more than 1048576 characters"):
        load_recipe(Path("/dev/zero"))
