"""Worker processes for pieces of work that do not depend on each other, and what they found, kept.

A killed run goes on with what is kept. Work with other sizes or steps is other work.
"""

import pickle
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from comparison.movies import Movies
from comparison.user_models import Parts

Result = Callable[[], Any]
"""Waits for a piece of work and returns what it found."""


class Workers:
    """Processes of one thread each; none: what is asked for is done at once, in this one.

    Args:
        count: of processes.
        kept: a folder where what is done is kept, so that a killed run goes on. Work with other
            sizes or steps is other work.
    """

    def __init__(self, count: int, kept: Path) -> None:
        self._pool = None
        if count:
            self._pool = ProcessPoolExecutor(
                count, get_context("spawn"), torch.set_num_threads, (1,)
            )
        self._kept = kept
        self.seconds: dict[str, float] = {}
        """Of the processor, that each named piece of work took."""

    def start(self, name: str, work: Callable[..., Any], *given: object, seed: int = 0) -> Result:
        """Begin a piece of work, and return what waits for its result."""
        known = [name, seed, *map(_decides, given)]
        path = self._kept / f"{sha256(repr(known).encode()).hexdigest()[:16]}.pickle"
        begun = partial(_do, path, work, *given, seed=seed)
        ends = begun if self._pool is None else self._pool.submit(begun).result

        def result() -> Any:  # noqa: ANN401  whatever the work returns
            ends()
            found, seconds = pickle.loads(path.read_bytes())  # noqa: S301  our own file
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            return found

        return result

    def each(self, name: str, work: Callable[..., Any], *given: object, seeds: int) -> list[Result]:
        """Begin a piece of work with several seeds."""
        return [self.start(name, work, *given, seed=seed) for seed in range(seeds)]

    def close(self) -> None:
        """Let the processes go."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _decides(given: object) -> object:
    """Return what a piece of work depends on, of something that it is given."""
    if isinstance(given, Parts):
        return _decides(given.movies), given.options
    return (given.num_films, len(given.split.train)) if isinstance(given, Movies) else given


def _do(path: Path, work: Callable[..., Any], *given: object, seed: int) -> None:
    """Write what work finds and the processor's seconds into a file, unless it is there.

    What is found comes back by this file alone: torch hands tensors to another process by the
    descriptor of their memory, and weights that are mapped from a checkpoint have none.
    """
    if path.is_file():
        return
    started = time.process_time()
    found = work(*given, seed=seed), time.process_time() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_bytes(pickle.dumps(found))
    whole.replace(path)
