from pathlib import Path

import pytest

from lapilli.errors import ConfigError, UnknownKeyError
from lapilli.train.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
SMALL = 'stage = "instruct"\n[optim]\nlr = 1\n[run]\nsteps = 3\nbatch_size = 2\n'


def written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_values_have_the_types_of_their_fields(tmp_path):
    recipe = load_recipe(written(tmp_path, SMALL + "[data]\nquestions = [1, 4]\n"))
    assert recipe.optim.lr == 1.0
    assert isinstance(recipe.optim.lr, float)
    assert recipe.data.questions == (1, 4)
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
        ('[optim]\nlr = "fast"\n', ConfigError, "optim.lr is 'fast': expected float"),
        ("[optim]\nlr = true\n", ConfigError, "optim.lr is True"),
        ("[optim]\n", ConfigError, "optim.lr is missing"),
        ("[optim]\nlr = -1\n", ConfigError, "optim.lr is -1"),
        ('[optim]\nlr = 1\nschedule = "step"\n', ConfigError, "schedule is 'step': .*cosine"),
        ("[optim]\nlr = 1\nbetas = [0.9]\n", ConfigError, "optim.betas is"),
        ("[optim\n", ConfigError, "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, change, kind, message):
    rest = "[run]\nsteps = 3\nbatch_size = 2\n"
    path = written(tmp_path, 'stage = "align"\n' + change + rest)
    with pytest.raises(kind, match=message):
        load_recipe(path)


def test_options_without_value_or_dashes_are_refused(tmp_path):
    path = written(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=r"--optim.lr has no value"):
        load_recipe(path, ["--optim.lr"])
    with pytest.raises(ConfigError, match=r"expected --section\.key VALUE"):
        load_recipe(path, ["lr", "1"])


def test_counts_below_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run.save_every is 0"):
        load_recipe(written(tmp_path, SMALL), ["--run.save_every", "0"])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_file_is_followed(path):
    run = load_recipe(path).run
    assert run.steps >= 1 or run.epochs > 0
