"""Which files and folders a recipe names, looked for before anything is read; knows no formats.

A relative path starts at the working directory, as on every command line: a recipe in the package
or in a repository serves whoever has the data, and `--data.sources` means what the shell means.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from lapilli.checkpoint.source import HUB_ID, is_local
from lapilli.errors import ConfigError, DataError
from lapilli.train.data.source import NAME_A_FILE, expand
from lapilli.train.recipe import Recipe


def refuse_missing(recipe: Recipe, file: Path) -> None:
    """What the recipe names is there, as far as this disk can tell: a hub id may be anywhere.

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
        path = Path(name).expanduser()
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
    """Key, name and what tells whether it is there."""
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
    return Path(name).expanduser().is_dir()


def _has_files(pattern: str) -> bool:
    try:
        return bool(expand(pattern))
    except DataError:
        return False
