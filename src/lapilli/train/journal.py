"""Everything that listens to a run: the log file, trackers, a progress bar, the curve at the end.

    write(record)    a line of the log: log.jsonl, TensorBoard, wandb
    tick(record)     every step: the bar

Processes that do not lead have a journal in which nothing is written.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lapilli.train.distributed import Team
from lapilli.train.plot import evaluation_curve, loss_curve, plot_losses
from lapilli.train.progress import ProgressBar
from lapilli.train.recipe import TrainerRecipe
from lapilli.train.tracker import Tracker, open_trackers
from lapilli.train.trainer.metrics import Record, RunLog


class Journal:
    """What is told to everyone who listens.

    Args:
        log: None: this process does not lead.
        trackers: other programs that collect curves.
        bar: None: no progress is shown.
        plot: whether `draw` draws.
    """

    def __init__(
        self,
        log: RunLog | None = None,
        trackers: Sequence[Tracker] = (),
        *,
        bar: ProgressBar | None = None,
        plot: bool = False,
    ) -> None:
        self._log, self._trackers, self._bar, self._plot = log, tuple(trackers), bar, plot

    def tick(self, record: Record, count: int) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.tick(record, count)

    def write(self, record: Record) -> None:
        """A record for the log."""
        if self._log is not None:
            self._log.write(record)
        for tracker in self._trackers:
            tracker.write(record)

    @property
    def records(self) -> Sequence[Record]:
        """What the log says so far; nothing in a process that does not lead."""
        return () if self._log is None else self._log.records()

    def warn(self, text: str) -> None:
        """One line for people on standard error."""
        if self._bar is not None:
            self._bar.say(text)
        elif self._log is not None:
            self._log.say(text)

    def sync(self) -> None:
        """Everything written so far is on the disk: the checkpoint that follows relies on it."""
        if self._log is not None:
            self._log.sync()
        for tracker in self._trackers:
            tracker.sync()

    def draw(self) -> None:
        """The loss over the steps as `loss.png` beside the log, where matplotlib is installed."""
        if self._log is None or not self._plot:
            return
        if find_spec("matplotlib") is None:
            self.warn(
                "loss.png is not drawn, as matplotlib is not installed: pip install "
                "'lapilli[train]', or set run.plot = false"
            )
            return
        records, folder = self._log.records(), self._log.path.parent
        if curve := loss_curve(records):
            name = folder.resolve().name
            found = {name: evaluation_curve(records)}
            plot_losses({name: curve}, folder / "loss.png", evaluations=found)

    def close(self, *, finished: bool) -> None:
        """Nothing more will come; `finished`: the run reached its last step."""
        if self._bar is not None:
            self._bar.close()
        for tracker in self._trackers:
            tracker.close(finished=finished)


@contextmanager
def open_journal(
    recipe: TrainerRecipe,
    folder: Path,
    span: tuple[int, int],
    *,
    team: Team,
    echo: bool,
    progress: bool,
) -> Iterator[Journal]:
    """The journal of the steps `span` (done, of all); what an earlier run wrote after it is gone.

    Raises:
        ConfigError: a tracker that the recipe asks for is not installed.
    """
    if not team.leads:
        yield Journal()
        return
    first, steps = span
    log = RunLog(folder, echo=echo)
    log.rewind(first)
    trackers = open_trackers(recipe, folder, first)
    bar = ProgressBar(first, steps, recipe.stage) if progress else None
    journal = Journal(log, trackers, bar=bar, plot=recipe.run.plot)
    finished = False
    try:
        yield journal
        finished = True
    finally:
        journal.close(finished=finished)
