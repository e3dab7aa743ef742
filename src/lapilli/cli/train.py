"""`lapilli train`: one stage of a recipe, from where it stopped."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapilli.cli.terminal import Device, Quiet, note
from lapilli.config.reader import given_path

if TYPE_CHECKING:
    from lapilli.train.recipe import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see recipes/.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run: state, log, model.")]
Gpus = Annotated[
    int | None,
    typer.Option("--plan", min=1, metavar="GPUS", help="Only say what it costs on so many GPUs."),
]
Exam = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Let the result answer N held-out samples; exact match is printed (run.exam).",
    ),
]


def train(
    context: typer.Context,
    recipe_file: RecipeFile,
    out: Out = None,
    device: Device = "auto",
    quiet: Quiet = False,
    gpus: Gpus = None,
    exam: Exam = None,
) -> None:
    """Train a model by a recipe; any value of it can be set: --optim.lr 2e-4 (--section.key VALUE).

    A run that was stopped goes on from its last checkpoint when the same command is given again.
    Under torchrun all processes train one model. The result lies in OUT/model. Relative paths in a
    recipe start in the folder where the command is started.
    """
    from lapilli.train.recipe.file import check_paths, load_recipe

    asked = [] if exam is None else ["--run.exam", str(exam)]
    recipe = load_recipe(recipe_file, [*context.args, *asked])
    if gpus is not None:
        _print_plan(recipe, gpus)
        return
    if out is None:
        raise typer.BadParameter("where does the run go?", param_hint="--out")
    if out.is_file():
        raise typer.BadParameter(f"{out} is a file: expected a folder", param_hint="--out")
    check_paths(recipe, recipe_file)
    _run(recipe, out, device=device, quiet=quiet)


def _run(recipe: "Recipe", out: Path, *, device: str, quiet: bool) -> None:
    from lapilli.rank.objective import build_objective
    from lapilli.train.distributed import joined, rank_info_of
    from lapilli.train.launch import launch
    from lapilli.train.trainer.loop import Stopped

    shows_bar = sys.stderr.isatty() and not quiet
    with joined(rank_info_of(os.environ), sharding=recipe.run.sharding, device=device) as parallel:
        try:
            task = launch(
                recipe,
                out,
                parallel=parallel,
                build=build_objective if recipe.objective else None,
                echo=parallel.is_main_process and not quiet and not shows_bar,
                progress=parallel.is_main_process and shows_bar,
            )
        except Stopped as stop:
            if parallel.is_main_process:
                note(stop.message)
            raise
    for why in task.skipped[:5]:
        note(f"skipped: {why}")
    if task.skipped:
        note(f"{len(task.skipped)} samples could not be read; others stood in for them")
    if parallel.is_main_process:
        _say_end(recipe, out, quiet=quiet)


def _say_end(recipe: "Recipe", out: Path, *, quiet: bool) -> None:
    """Say how the run went, by its log; a rising loss is told even with --quiet."""
    from lapilli.train.results import ANSWERS, FIGURE
    from lapilli.train.trainer.metrics import RunLog, advice

    records, optim = RunLog(out).records(), recipe.optim
    if text := advice(records, max(optim.lr, optim.projector_lr or 0.0, optim.tower_lr or 0.0)):
        note(text)
    if quiet:
        return
    exam = next((record for record in reversed(records) if FIGURE in record), None)
    if exam is not None and recipe.run.exam:
        note(
            f"exact match {exam[FIGURE]:.1%}: {exam['equal']} of {exam['answers']} held-out answers"
            f" ({out / ANSWERS})"
        )
    note(f"{out / 'model'}")


def _print_plan(recipe: "Recipe", gpus: int) -> None:
    """Print what the run costs on three kinds of GPU."""
    from dataclasses import replace

    from lapilli.checkpoint.read.plan import make_plan
    from lapilli.errors import ConfigError, MissingFileError
    from lapilli.plan import A100, H100, RTX4090, plan, usual_work
    from lapilli.train.data import open_dataset

    if recipe.model.checkpoint is None:
        raise ConfigError("recipe key model.checkpoint is missing: a plan needs its config.json")
    try:
        config = make_plan(recipe.model.checkpoint, fetch=False).config
    except MissingFileError as error:
        raise ConfigError(
            f"{error}. A plan reads config.json of the model: build it first, or name another of "
            "its sizes, --model.checkpoint liuhaotian/llava-v1.5-7b"
        ) from error
    work = usual_work(recipe, config)
    if recipe.data.sources and all(given_path(one.path).is_file() for one in recipe.data.sources):
        work = replace(work, samples=len(open_dataset(recipe.data.sources)))
    typer.echo(
        f"{work.samples:,} samples of {work.positions:.0f} positions ({work.supervised:.0f} "
        f"supervised) and {work.tiles:.0f} tiles are assumed: docs/guide/cluster.md"
    )
    for gpu in (A100, H100, RTX4090):
        typer.echo(f"\n{plan(recipe, config, gpus, gpu=gpu, work=work).table()}", nl=False)
