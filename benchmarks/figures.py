"""Which figures an engine gets and how they are taken, the same for every engine.

    load | look at a picture | ask about a new one, 64 tokens | ask again | many at the same time

Knows pictures as bytes and texts as ids. Imports no torch: other engines are measured in processes
that have none, and its memory must not count as theirs.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

Figures = dict[str, float]
PICTURE_POSITIONS = 576
"""That a picture takes in a prompt, in every shape."""
Times = list[float]


class Question(NamedTuple):
    """A prompt: square RGB pictures (row by row, three bytes per pixel), then ids of its text."""

    pictures: tuple[bytes, ...]
    text: tuple[int, ...]


@runtime_checkable
class Timed(Protocol):
    """An engine that is ready to answer."""

    @property
    def side(self) -> int:
        """Pixels of a picture's side."""

    @property
    def facts(self) -> Figures:
        """What is known of it: `weight_bytes`, read for one decoded token."""

    def look(self, picture: bytes) -> None:
        """The tower and the projector alone."""

    def answer(self, questions: Sequence[Question], new_tokens: int) -> list[Times]:
        """All questions at the same time, greedily, no end token.

        Returns, for each question and each of its tokens, the seconds from the call until the
        token was chosen. What was read for earlier calls may be used again.
        """


@runtime_checkable
class MeasuresItself(Protocol):
    """An engine that is a program with a clock of its own."""

    def measure(self, plan: "Plan") -> Figures:
        """Return the figures of one process, those of them that the program can take."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        text: positions of text, the first of them BOS.
        new_tokens: of an answer.
        repeats: of everything but `many`.
        many: requests at the same time, each with its own picture; 0 leaves that out.
        vocabulary: ids of texts lie below it.
    """

    text: int = 40
    new_tokens: int = 64
    repeats: int = 2
    many: int = 8
    vocabulary: int = 900


def picture(number: int, side: int) -> bytes:
    """A picture of noise, another one for every number."""
    return random.Random(number).randbytes(3 * side * side)


def words(number: int, count: int, vocabulary: int) -> tuple[int, ...]:
    """Token ids, other ones for every number; the first ids are often special."""
    source = random.Random(number)
    return tuple(source.randrange(10, vocabulary) for _ in range(count))


def peak_bytes() -> int | None:
    """Highest resident memory of this process so far; None where the system does not tell.

    On Linux not ru_maxrss: that one starts from the memory of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rate(times: Times) -> float:
    """Tokens a second after the first."""
    return (len(times) - 1) / (times[-1] - times[0])


def rate_of_many(answers: Sequence[Times]) -> float:
    """Tokens a second of all together, while all of them grow."""
    start = max(times[0] for times in answers)
    end = min(times[-1] for times in answers)
    count = sum(start < moment <= end for times in answers for moment in times)
    return count / (end - start) if end > start else 0.0


def measure(engine: Timed, plan: Plan) -> Figures:
    """The figures of one process; every first question shows a new picture."""

    def ask(picture_number: int, number: int) -> Question:
        seen = picture(picture_number, engine.side)
        return Question((seen,), words(number, plan.text - 1, plan.vocabulary))

    # Pages of the weights are read and buffers made before the clock counts.
    engine.answer([Question((), words(0, 8, plan.vocabulary))], 2)
    engine.look(picture(0, engine.side))
    rows: dict[str, list[float]] = {}
    for turn in range(1, plan.repeats + 1):
        new = picture(1000 + turn, engine.side)
        started = time.perf_counter()
        engine.look(new)
        seconds = {"tower_s": time.perf_counter() - started}
        [first] = engine.answer([ask(turn, turn)], plan.new_tokens)
        [second] = engine.answer([ask(turn, 100 + turn)], 2)
        seconds |= {"first_s": first[0], "tokens_per_s": rate(first), "second_s": second[0]}
        for name, value in seconds.items():
            rows.setdefault(name, []).append(value)
    found = {name: statistics.median(values) for name, values in rows.items()}
    found |= {"second_over_first": found["second_s"] / found["first_s"]} | engine.facts
    _note_peak(found, "peak_bytes")
    if plan.many:
        answers = engine.answer([ask(200 + i, 200 + i) for i in range(plan.many)], plan.new_tokens)
        together = rate_of_many(answers)
        if together:  # short answers of the first may be over when the last begins
            found["many_tokens_per_s"] = together
        last = max(times[-1] for times in answers)
        found["many_whole_tokens_per_s"] = sum(map(len, answers)) / last
        _note_peak(found, "many_peak_bytes")
    return found


def _note_peak(found: Figures, name: str) -> None:
    peak = peak_bytes()
    if peak is not None:
        found[name] = float(peak)
