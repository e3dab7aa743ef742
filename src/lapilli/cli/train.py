"""`lapilli train`: one stage of a recipe, from where it stopped."""

from pathlib import Path
from typing import Annotated

import typer

from lapilli.cli import options
from lapilli.cli.terminal import plain_errors

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see recipes/.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run: state, log, results.")]

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What typer has to be told so that `--section.key value` comes through."""


def train(
    context: typer.Context, recipe_file: RecipeFile, out: Out, quiet: options.Quiet = False
) -> None:
    """Train a model by a recipe; any value of it can be set: --optim.lr 2e-4.

    A run that was stopped goes on from its last saved step when it is started again.
    """
    with plain_errors():
        from lapilli.train.loop import train as run
        from lapilli.train.parallel import ALONE
        from lapilli.train.recipe_file import load_recipe
        from lapilli.train.task import build_task

        recipe = load_recipe(recipe_file, context.args)
        task = build_task(recipe, ALONE)
        run(task, recipe, out, team=ALONE, echo=not quiet)
