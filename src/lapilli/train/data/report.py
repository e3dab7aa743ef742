"""What a data set is like and what is wrong with it, as values and as text for people."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from lapilli.config.reader import shown

Kind = Literal[
    "record",
    "turns",
    "image",
    "mended",
    "empty answer",
    "no labels",
    "too long",
    "duplicate id",
    "duplicate image",
]
NOTES: frozenset[Kind] = frozenset({"mended", "duplicate id", "duplicate image"})
"""Kinds that training takes as they are; all others end it, or cost a sample."""


_LONGEST = 1000  # letters of a line: a tar archive may call a sample anything


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about one sample."""

    kind: Kind
    where: str
    id: str
    text: str

    @property
    def is_error(self) -> bool:
        """Whether training would fail or lose something."""
        return self.kind not in NOTES

    def __str__(self) -> str:
        """One line of printable letters, the place first."""
        name = "" if self.id == self.where else f" (id {shown(self.id)})"
        line = f"{self.where}{name}: {self.text}"
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


@dataclass(frozen=True, slots=True)
class Spread:
    """A few numbers about many."""

    min: int
    median: int
    p95: int
    max: int
    total: int

    @classmethod
    def of(cls, values: Iterable[int]) -> "Spread | None":
        """None of nothing."""
        numbers = np.fromiter(values, np.int64)
        if not len(numbers):
            return None
        median, p95 = (int(np.quantile(numbers, q, method="inverted_cdf")) for q in (0.5, 0.95))
        return cls(int(numbers.min()), median, p95, int(numbers.max()), int(numbers.sum()))

    def __str__(self) -> str:
        """For a table."""
        return f"min {self.min}  median {self.median}  p95 {self.p95}  max {self.max}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What `check` found.

    Attributes:
        source: the file.
        num_samples: records of it.
        num_with_media: of those that could be read.
        num_text_only: the same without media.
        num_media: places of pictures in all samples.
        num_different_media: files or bytes behind them.
        num_answers: turns of the assistant.
        words: of a sample, placeholders included.
        positions: of a row, pictures included; None without a model.
        supervised: positions that the loss counts; None without a model.
        max_length: what `positions` was compared with; None: nothing.
        findings: in the order of the file.
    """

    source: str
    num_samples: int
    num_with_media: int
    num_text_only: int
    num_media: int
    num_different_media: int
    num_answers: int
    words: Spread | None
    positions: Spread | None
    supervised: Spread | None
    max_length: int | None
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What training would stumble over."""
        return tuple(finding for finding in self.findings if finding.is_error)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is odd and does no harm."""
        return tuple(finding for finding in self.findings if not finding.is_error)

    @property
    def supervised_share(self) -> float | None:
        """Supervised positions as a part of all."""
        if self.positions is None or self.supervised is None:
            return None
        return self.supervised.total / self.positions.total

    def to_dict(self) -> dict[str, Any]:
        """The same for json.dumps."""
        return {
            **asdict(self),
            "supervised_share": self.supervised_share,
            "num_errors": len(self.errors),
            "num_notes": len(self.notes),
        }

    def to_text(self, *, limit: int = 20) -> str:
        """The same for people; at most `limit` lines of every kind of finding."""
        lines = [
            f"{self.source}: {self.num_samples} samples, {self.num_with_media} with images "
            f"({self.num_media} images, {self.num_different_media} different), "
            f"{self.num_text_only} without, {self.num_answers} answers",
            f"words       {self.words or 'none'}",
        ]
        if self.positions is not None and self.supervised is not None:
            room = "" if self.max_length is None else f"  of {self.max_length}"
            lines += [
                f"positions   {self.positions}{room}",
                f"supervised  {self.supervised}  ({self.supervised_share:.1%} of all positions)",
            ]
        for title, findings in (("error", self.errors), ("note", self.notes)):
            if findings:
                lines.append(f"{len(findings)} {title}{'s' * (len(findings) > 1)}")
                lines += _listed(findings, limit)
        return "\n".join(lines if self.findings else [*lines, "nothing is wrong"])


def _listed(findings: Sequence[Finding], limit: int) -> list[str]:
    counts: Counter[Kind] = Counter()
    lines = []
    for finding in findings:
        counts[finding.kind] += 1
        if counts[finding.kind] <= limit:
            lines.append(f"  {finding}")
    for kind, number in counts.items():
        if number > limit:
            lines.append(f"  ... and {number - limit} more of the kind {kind!r}")
    return lines
