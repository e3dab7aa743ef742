"""`lapilli train`: one stage of a recipe, from where it stopped."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lapilli.cli import options
from lapilli.cli.terminal import note, plain_errors

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see recipes/.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run: state, log, model.")]

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What typer has to be told so that `--section.key value` comes through."""


def train(
    context: typer.Context,
    recipe_file: RecipeFile,
    out: Out,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Train a model by a recipe; any value of it can be set: --optim.lr 2e-4.

    A run that was stopped goes on from its last checkpoint when the same command is given again.
    Under torchrun all processes train one model. The result lies in OUT/model.
    """
    with plain_errors():
        from lapilli.train.launch import launch
        from lapilli.train.parallel import joined, seat_of
        from lapilli.train.recipe_file import load_recipe

        recipe = load_recipe(recipe_file, context.args)
        shows_bar = sys.stderr.isatty() and not quiet
        with joined(seat_of(os.environ), sharding=recipe.run.sharding, device=device) as team:
            task = launch(
                recipe,
                out,
                team=team,
                echo=team.leads and not quiet and not shows_bar,
                progress=team.leads and shows_bar,
            )
        for why in task.skipped[:5]:
            note(f"skipped: {why}")
        if task.skipped:
            note(f"{len(task.skipped)} samples could not be read; others stood in for them")
        if team.leads and not quiet:
            note(f"{out / 'model'}")
