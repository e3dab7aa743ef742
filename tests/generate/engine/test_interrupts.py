"""An interrupt may come between any two lines: blocks are freed and answers stay right."""

import dataclasses
import itertools
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lapilli
from lapilli.errors import GenerationError
from lapilli.generate.engine import Engine
from lapilli.generate.output import Generation
from lapilli.generate.reference import ModelLock, lock_of
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import SMALL, alone, picture, request_of

pytestmark = pytest.mark.slow

ROOT = Path(lapilli.__file__).parent / "generate"
WATCHED = str(ROOT / "engine")
NOT_WATCHED = ("WeightWatch", "_Glance", "_same", "_version", "_add", "content_digest")
"""They change nothing that a step hands over, and would be most of the lines."""
NEVER_HERE = ("self._held_by = None", "with self._lock", "try:")
"""Python does not look for signals between the beginning of a finally and its first assignment, nor
between the end of a `with` and the release of its lock, nor where a `try` begins: nothing is done
in these places, but a trace is shown a line."""


class Interrupt:
    """Raises KeyboardInterrupt before the nth line of the engine that this thread comes to."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.lines = 0

    def __enter__(self) -> "Interrupt":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(WATCHED) or code.co_qualname.startswith(NOT_WATCHED):
            return None
        if event == "line" and not line_of(frame).startswith(NEVER_HERE):
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._trace


_SOURCES: dict[str, list[str]] = {}


def line_of(frame) -> str:
    name = frame.f_code.co_filename
    if name not in _SOURCES:
        _SOURCES[name] = Path(name).read_text().splitlines()
    return _SOURCES[name][frame.f_lineno - 1].strip()


SOME = 8
EVERY = int(os.environ.get("LAPILLI_INTERRUPT_EVERY", "211"))
"""Lines from one interrupt to the next in the slow test; 1 takes most of an hour."""
# By the clock ("auto") a session would have another number of lines each time.
TINY = dataclasses.replace(SMALL, kv_bytes=14 * 2 * 2 * 2 * 4 * 8 * 4, speculate="on")
MINE = [
    request_of([3, 9, picture(0), 4], max_new_tokens=5),
    request_of([3, 9, picture(0), 8, 8, 8], max_new_tokens=6, temperature=1.0, seed=1),
    request_of([5, picture(2), 3], max_new_tokens=3),
]
THEIRS = request_of([3, 9, picture(0), 5], max_new_tokens=7)


def session(engine: Engine) -> None:
    """What is interrupted: several answers at once, one that is given up, all blocks in use."""
    engine.run(MINE)
    pieces = engine.stream(MINE[0])
    next(pieces)
    pieces.close()
    engine.run(MINE[:1])


@pytest.fixture(scope="module")
def right(model) -> dict[int, Generation]:
    """What each request is answered alone, by its place."""
    return {at: alone(model, request) for at, request in enumerate([*MINE, THEIRS])}


def check(model, right: dict[int, Generation], at: int) -> bool:
    """Interrupt a session before its nth line and look at what is left; False: it was over."""
    engine = Engine(model, WordTokenizer(), options=TINY)
    theirs = engine.submit(THEIRS)  # of somebody else
    with Interrupt(at) as interrupt:
        try:
            session(engine)
        except KeyboardInterrupt:
            pass
        else:
            return interrupt.lines >= at
    assert is_free(lock_of(model.language_model))
    while engine.step():
        pass
    if theirs.error is None:
        assert_same(theirs.generation, right[len(MINE)], model, THEIRS)
    else:
        assert isinstance(theirs.error, GenerationError)
        assert "interrupted" in str(theirs.error)
    for place, answer in enumerate(engine.run(MINE)):
        assert_same(answer, right[place], model, MINE[place])
    assert not engine.has_work
    assert engine.pool.available == engine.pool.capacity
    return True


def is_free(lock: ModelLock) -> bool:
    """Return whether another thread could take the lock; this one may hold it and not notice."""
    with ThreadPoolExecutor(1) as other:
        taken = other.submit(lambda: lock.turn.acquire(timeout=5) and lock.turn.release() is None)
        return bool(taken.result())


def test_an_interrupt_before_some_lines(model, right):
    engine = Engine(model, WordTokenizer(), options=TINY)
    engine.submit(THEIRS)
    with Interrupt(None) as counted:
        session(engine)
    for at in random.Random(0).sample(range(1, counted.lines), SOME):
        assert check(model, right, at)


def test_an_interrupt_before_every_line(model, right):
    for at in itertools.count(1, EVERY):
        if not check(model, right, at):
            break
