"""Prefetching of batches in other processes, in order; a batch is a function's value.

    worker 0   batch(0, 0)   batch(0, 2) ...      item k of the run is made by worker k mod n
    worker 1   batch(0, 1)   batch(1, 0) ...
    take(step, micro)                             the same value as with no worker at all

A worker is a fork that has what the function closes over; tensors come back in shared memory. It
ends when the training process does, however that ends.

torch's DataLoader does the same but for two things: it raises a worker's death from a signal
handler, in whatever the training process does at that moment, which may be the writing of a
checkpoint, and it cannot say which samples the worker died of. It also replaces an error's text.
"""

import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import Array, c_int64
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, Final

import torch

from lapilli.errors import ConfigError
from lapilli.train.trainer.task import TrainingError

Place = tuple[int, int]  # step, micro
MakeBatch = Callable[[int, int], tuple[Any, int]]
Describe = Callable[[int, int], str]
_DEPTH: Final = 2  # items that a worker has been asked for at once
_IDLE: Final = (-1, -1)


class WorkerError(Exception):
    """The place in a worker that an error came from; stands behind the error itself."""


@dataclass(slots=True)
class _Worker:
    process: ForkProcess
    line: Connection
    making: "Array[c_int64]"
    asked: deque[Place] = field(default_factory=deque)


class ReadAhead:
    """A queue of the items of `places`, made by workers and handed out in that order.

    `describe` says what an item is made of, should a worker die of it; "": nothing is known.

    Raises:
        ConfigError: this system has no fork.
    """

    def __init__(
        self,
        make: MakeBatch,
        places: Iterable[Place],
        workers: int,
        *,
        describe: Describe | None = None,
    ) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise ConfigError("run.workers needs a system with fork: set run.workers = 0")
        self._places, self._describe = iter(places), describe
        self._next = count()
        self._workers: list[_Worker] = []
        context = multiprocessing.get_context("fork")
        for _ in range(workers):
            ours, theirs = context.Pipe()
            making = context.RawArray(c_int64, _IDLE)
            foreign = [worker.line for worker in self._workers] + [ours]
            process = context.Process(
                target=_work, args=(make, theirs, making, foreign), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, making))
        for _ in range(_DEPTH):
            for worker in self._workers:
                self._ask(worker)

    def _ask(self, worker: _Worker) -> None:
        place = next(self._places, None)
        if place is None:
            return
        worker.asked.append(place)
        try:
            worker.line.send(place)
        except OSError as error:
            raise self._death(worker) from error

    def take(self, step: int, micro: int) -> tuple[Any, int]:
        """Return the next item, which has to be this one.

        Raises:
            TrainingError: the worker that makes it died.
            Exception: what the function raised, with the worker's traceback behind it.
        """
        worker = self._workers[next(self._next) % len(self._workers)]
        if not worker.asked or worker.asked[0] != (step, micro):
            raise ConfigError(
                f"micro-batch {micro} of step {step} was taken out of order: expected "
                f"{worker.asked[0] if worker.asked else 'nothing more'}"
            )
        try:
            made, error, trace = worker.line.recv()
        except (EOFError, OSError) as lost:
            raise self._death(worker) from lost
        worker.asked.popleft()
        if error is not None:
            raise error from WorkerError(trace)
        self._ask(worker)
        return made[0], made[1]

    def _death(self, worker: _Worker) -> TrainingError:
        # Items that it has made are gone with it; the one that it was making is what it died of.
        making = tuple(worker.making)
        step, micro = worker.asked[0] if making == _IDLE else making
        worker.process.join(timeout=5)
        made_of = self._describe(step, micro) if self._describe is not None else ""
        return TrainingError(
            f"the worker that reads micro-batch {micro} of step {step + 1}"
            f"{f' ({made_of})' if made_of else ''} died "
            f"({_cause(worker.process.exitcode)}): start the same command again to go on from "
            "the last checkpoint; with run.workers = 0 the sample is read in the training process"
        )

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.line.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []


def _cause(code: int | None) -> str:
    """Return a process's end in words."""
    if code is None:
        return "it still runs, but does not answer"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hints = {
        "SIGKILL": ": often the kernel's, when memory is full",
        "SIGBUS": ": often /dev/shm is full; give the container more --shm-size",
    }
    return name + hints.get(name, "")


def _work(
    make: MakeBatch, line: Connection, making: "Array[c_int64]", foreign: Sequence[Connection]
) -> None:
    """Make, in a worker, what is asked for until nobody is there any more."""
    for other in foreign:  # or their ends would stay open when the training process dies
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        while True:
            step, micro = line.recv()
            making[:] = [step, micro]
            answer = _answer(make, step, micro)
            making[:] = list(_IDLE)
            line.send(answer)
    except (EOFError, OSError):
        return


def _answer(
    make: MakeBatch, step: int, micro: int
) -> tuple[tuple[Any, int] | None, Exception | None, str]:
    """Return the item, or the error and where it came from."""
    try:
        return make(step, micro), None, ""
    except Exception as error:  # noqa: BLE001  raised again where the item is taken
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  our own
        except Exception:  # noqa: BLE001  an error may refuse to be pickled in any way
            error = TrainingError(f"{type(error).__name__}: {error}")
        return None, error, f"\n{trace}"


@contextmanager
def batches(
    make: MakeBatch,
    places: Iterable[Place],
    workers: int,
    *,
    describe: Describe | None = None,
) -> Iterator[MakeBatch]:
    """Give a function that returns the items of `places` in order; `make` without workers."""
    if workers == 0:
        yield make
        return
    ahead = ReadAhead(make, places, workers, describe=describe)
    try:
        yield ahead.take
    finally:
        ahead.close()
