from pathlib import Path

import pytest

from lapilli.errors import ConfigError, UnknownKeyError
from lapilli.train.recipe.file import load_recipe

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
