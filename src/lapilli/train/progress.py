"""A progress bar for people on standard error; the only file of the trainer that imports rich."""

import time
from collections import deque
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lapilli.train.trainer.metrics import Record

_WINDOW: Final = 20  # steps that the speed is taken over


class ProgressBar:
    """Steps, loss, speed, memory and the time that is left, redrawn in place.

    Args:
        done: steps of earlier runs.
        steps: of the whole run.
        title: stands before the bar.
        console: where it goes; None: standard error, be it a terminal or not.
    """

    def __init__(
        self, done: int, steps: int, title: str, *, console: Console | None = None
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console or Console(stderr=True, force_terminal=True),
        )
        self._task = self._progress.add_task(title, total=steps, completed=done, figures="")
        self._ticks: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._progress.start()

    def tick(self, record: Record, count: int) -> None:
        """One more step with its loss and memory, and how many tokens it learned from."""
        self._ticks.append((time.monotonic(), count))
        (first, skipped), (last, _) = self._ticks[0], self._ticks[-1]
        tokens = sum(number for _, number in self._ticks) - skipped
        speed = f"{tokens / (last - first):,.0f} tokens/s  " if last > first else ""
        figures = f"loss {record['loss']:.4f}  {speed}{record['gib']:.1f} GiB"
        self._progress.update(self._task, completed=record["step"], figures=figures)

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state of the bar standing."""
        self._progress.stop()
