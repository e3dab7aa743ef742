"""Checks of a whole recipe before anything is loaded: idle keys, and paths that lead nowhere.

A key that another value makes idle would be swallowed, so it is refused. A relative path starts at
the working directory, as on every command line: a recipe in a repository serves whoever has the
data, and `--data.sources` means what the shell means.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lapilli.checkpoint.source import HUB_ID, is_local
from lapilli.config.reader import given_path
from lapilli.errors import ConfigError, DataError, UnknownKeyError
from lapilli.train.data.source import NAME_A_FILE, expand
from lapilli.train.recipe import Recipe, TrainerRecipe


def check_idle_keys(recipe: Recipe) -> None:
    """Check that every key which has another value than its default changes something.

    Raises:
        UnknownKeyError: the first key that another value of the recipe makes idle, and why.
    """
    idle = dict(_idle(recipe))
    for key in set_keys(recipe):
        if key in idle:
            raise UnknownKeyError(
                f"recipe key {key} would change nothing: {idle[key]}, or leave {key} out"
            )


def set_keys(recipe: TrainerRecipe) -> Iterator[str]:
    """Yield the names of the keys whose values are not the defaults, section.key."""
    for section in dataclasses.fields(recipe):
        part = getattr(recipe, section.name)
        if not dataclasses.is_dataclass(part):
            continue  # stage, and sections that are not there
        changed = [
            f"{section.name}.{field.name}"
            for field in dataclasses.fields(part)
            if getattr(part, field.name) != default_value(field)
        ]
        if not changed and section.default is None:
            changed = [section.name]  # an optional section that is there as it is
        yield from changed


def default_value(field: "dataclasses.Field[Any]") -> Any:  # noqa: ANN401  of any field
    """Return the default of a dataclass field; dataclasses.MISSING where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _idle(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield keys that another value of the recipe makes idle, and what would make them count."""
    yield from idle_optim(recipe)
    if not recipe.noise.alpha:
        yield "noise.on", "noise.alpha is 0, so there is no noise: set noise.alpha"
    data = recipe.data
    if data.evaluation:
        yield "data.held_out", "data.evaluation names what is evaluated: leave that out"
    elif not data.held_out:
        for key in ("evaluate_every", "exam"):
            yield f"run.{key}", "nothing is held out: set data.held_out or data.evaluation"
    if recipe.lora is None and recipe.model.adapter is None:
        yield "save.merge", "there is no adapter to fold in: add [lora]"
    if not _saves_whole(recipe):
        yield "save.dtype", "what comes out is no whole checkpoint: set save.merge with [lora]"


def _saves_whole(recipe: Recipe) -> bool:
    if recipe.lora is not None or recipe.model.adapter is not None:
        return recipe.save.merge
    return recipe.saves_frozen or recipe.model.tune_tower


def idle_optim(recipe: TrainerRecipe) -> Iterator[tuple[str, str]]:
    """Yield keys of the optimizer that change nothing, and what would make them count."""
    optim = recipe.optim
    if optim.name == "sgd":
        for key in ("betas", "eps"):
            yield f"optim.{key}", 'optim.name is "sgd", which has none: set optim.name = "adamw"'
    if optim.schedule != "trapezoid":
        yield (
            "optim.decay_share",
            f'optim.schedule is "{optim.schedule}": set optim.schedule = "trapezoid"',
        )
    if optim.schedule == "constant":
        yield (
            "optim.min_lr_ratio",
            'optim.schedule is "constant", which keeps the rate: set another',
        )
    if optim.warmup_steps:
        yield "optim.warmup_ratio", "optim.warmup_steps says it already: leave that out"
    if not optim.weight_decay:
        yield "optim.decay", "optim.weight_decay is 0: set it"


def check_paths(recipe: Recipe, file: Path) -> None:
    """Check that what the recipe names is there, as far as this disk can tell.

    A hub id may be anywhere.

    Args:
        recipe: with the options of the command laid over it.
        file: that it was read from.

    Raises:
        ConfigError: a path that leads nowhere, and where it would, from the recipe's own folder; a
            folder where files of data are meant.
        CheckpointError: a file where a checkpoint's directory is meant.
    """
    for key, name, is_there in _paths(recipe):
        if name is None or is_there(name):
            continue
        path = given_path(name)
        if is_there is _has_files and path.is_dir():
            raise ConfigError(
                f"recipe key {key} is {name!r}, and {path.absolute()} is a folder: {NAME_A_FILE}"
            )
        beside = file.absolute().parent / path
        lies_beside = is_there(str(beside))
        if is_there is is_local and HUB_ID.fullmatch(name) and not lies_beside:
            continue
        there = f"; {beside} is there: write that, or start in {file.absolute().parent}"
        raise ConfigError(
            f"recipe key {key} is {name!r}, and there is no {path.absolute()}: relative paths "
            f"start in the folder where the command is started{there if lies_beside else ''}"
        )


def _paths(recipe: Recipe) -> Iterator[tuple[str, str | None, Callable[[str], bool]]]:
    """Yield key, name and what tells whether it is there."""
    model, distill = recipe.model, recipe.distill
    yield "model.checkpoint", model.checkpoint, is_local
    yield "model.adapter", model.adapter, is_local
    yield "model.projector", model.projector, _is_folder
    yield "distill.teacher", None if distill is None else distill.teacher, is_local
    for part in ("sources", "evaluation"):
        for number, source in enumerate(getattr(recipe.data, part)):
            yield f"data.{part}[{number}].path", source.path, _has_files
            yield f"data.{part}[{number}].images", source.images, _is_folder


def _is_folder(name: str) -> bool:
    return given_path(name).is_dir()


def _has_files(pattern: str) -> bool:
    try:
        return bool(expand(pattern))
    except DataError:
        return False
