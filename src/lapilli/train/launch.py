"""Launch of a run: a recipe from its files to its results, in every process.

start -> what could not be saved is refused -> steps -> FOLDER/model, also on the way where
small -> the exam, which asks what was saved -> model card
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lapilli import __version__
from lapilli.checkpoint.source import RESULTS
from lapilli.errors import ConfigError
from lapilli.lora import adapters
from lapilli.train.card import add_card, model_card
from lapilli.train.distributed import ParallelContext
from lapilli.train.exam import exam_record, hold_exam, write_exam
from lapilli.train.recipe import Recipe
from lapilli.train.results import Results, save_results
from lapilli.train.task import TrainingTask, build_task
from lapilli.train.trainer.loop import number_of_steps, train
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.sharded_state import gather
from lapilli.train.trainer.state import holds_state


def launch(
    recipe: Recipe,
    folder: Path,
    *,
    parallel: ParallelContext,
    echo: bool = False,
    progress: bool = False,
) -> TrainingTask:
    """Run a recipe from where it stopped, and leave its results in `folder/model`.

    A projector or an adapter is saved with every checkpoint, a whole model at the end. With
    run.exam the main process then answers held-out questions, while the others wait.

    Args:
        recipe: of the stage align or instruct.
        folder: of the run.
        parallel: this process among all.
        echo: log lines on stderr.
        progress: a progress bar on stderr.

    Raises:
        ConfigError: something else lies where the results would, or another run writes there.
        LapilliError: see build_task, Results.of and train.
    """
    check_output_folder(folder, recipe)
    task = build_task(recipe, parallel)
    saver = _Saver(task, Results.of(task.loaded, recipe), folder / RESULTS)
    with locked(folder) if parallel.is_main_process else nullcontext():
        train(
            task,
            recipe,
            folder,
            parallel=parallel,
            echo=echo,
            progress=progress,
            on_save=saver.on_the_way,
        )
        saver.save(card=not recipe.run.exam)
        if recipe.run.exam:
            saver.examine(echo=echo)
    return task


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make this the only run that writes to `folder`, where the system can do that.

    The system lets go of the lock when the process ends, however it ends.

    Raises:
        ConfigError: another run writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run trains into {folder}: wait for it, or give another folder as --out"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(number)


def check_output_folder(folder: Path, recipe: Recipe) -> None:
    """Check that `folder/model`, which the results replace, is nothing that somebody needs.

    Raises:
        ConfigError: no run that can go on left it, or this run begins with it.
    """
    results, model = folder / RESULTS, recipe.model
    teacher = None if recipe.distill is None else recipe.distill.teacher
    for given in (model.checkpoint, model.projector, model.adapter, teacher):
        if given is None:
            continue
        start = Path(given).expanduser()
        if results.resolve() in (start.resolve(), (start / RESULTS).resolve()):
            raise ConfigError(
                f"the results of this run would replace {results}, which it begins with: give "
                "another folder as --out"
            )
    if results.exists() and not holds_state(folder):
        raise ConfigError(
            f"the results of this run would replace {results}, and there is no state of a run "
            "beside it to go on from: give another folder as --out, or move it away"
        )


def facts_of(task: TrainingTask) -> dict[str, str]:
    """Return what a model card says of a run beside its log."""
    parameters = task.model.vlm.parameters()
    learned = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    held_out = "" if task.held_out is None else f", and {len(task.held_out):,} held out"
    return {
        "samples": f"{task.num_samples:,}{held_out}",
        "trainable parameters": f"{learned:,}",
        "made with": f"lapilli {__version__}, torch {torch.__version__}, "
        f"{task.parallel.size} x {task.parallel.device.type}",
    }


@dataclass(frozen=True, slots=True)
class _Saver:
    task: TrainingTask
    results: Results
    folder: Path

    def on_the_way(self, step: int) -> None:
        """Save with a checkpoint what is small enough."""
        del step
        model = self.task.model.vlm
        if self.results.recipe.stage == "align" or any(True for _ in adapters(model)):
            self.save()

    def save(self, *, card: bool = False) -> None:
        """Save the results as the model is now; every process has to call it.

        Args:
            card: with the model card, whose digest reads all of the data.
        """
        parallel, model = self.task.parallel, self.task.model.vlm
        state = gather(model.state_dict(), parallel) if parallel.is_sharded else None
        if parallel.is_main_process:
            extra = None
            if card:
                extra = model_card(self.results, self.folder.parent, facts=facts_of(self.task))
            save_results(self.folder, model, self.results, state=state, extra=extra)
        parallel.wait()

    def examine(self, *, echo: bool = False) -> None:
        """Let the saved results answer held-out questions, log the metrics, add the card.

        Every process has to call it; the main process alone works, as it alone is sure to see the
        files.
        """
        task, parallel, folder = self.task, self.task.parallel, self.folder.parent
        held_out, number = task.held_out, self.results.recipe.run.exam
        if parallel.is_main_process and held_out is not None:
            graded = hold_exam(
                self.folder, held_out, number, template=task.template, device=parallel.device
            )
            write_exam(folder, graded)
            log = RunLog(folder, echo=echo)
            record = exam_record(number_of_steps(task, self.results.recipe.run), graded)
            if record not in log.records():  # the same command may be given again
                log.write(record)
            card = model_card(self.results, folder, facts=facts_of(task))
            add_card(self.folder, card)
        parallel.wait()
