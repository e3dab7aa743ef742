"""Where a recipe's relative paths start, and what is said where they lead nowhere."""

from dataclasses import replace

import pytest

from lapilli.errors import CheckpointError, ConfigError
from lapilli.train.recipe import DataRecipe, DistillRecipe, ModelRecipe, SourceRecipe
from lapilli.train.recipe.checks import check_paths
from tests.train.conftest import new_recipe


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
