"""The conformance table as text and as JSON. Knows results, not how they were made."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """What became of one case through one path."""

    set: str
    variant: str
    op: str
    path: str
    case: str
    status: str  # passed | failed | skipped
    reasons: list[str] = field(default_factory=list)
    worst: float = 0.0
    worst_of_tolerance: float = 0.0
    worst_name: str = ""
    seconds: float = 0.0
    differs: str = ""


@dataclass
class Cell:
    """All cases of one op of one variant through one path."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    worst: float = 0.0
    worst_of_tolerance: float = 0.0
    worst_name: str = ""
    differs: set[str] = field(default_factory=set)

    def add(self, result: Result) -> None:
        setattr(self, result.status, getattr(self, result.status) + 1)
        if result.worst_of_tolerance >= self.worst_of_tolerance and result.worst_name:
            self.worst, self.worst_name = result.worst, result.worst_name
            self.worst_of_tolerance = result.worst_of_tolerance
        if result.differs:
            self.differs.add(result.differs)


NOTES = {
    "2": "mpt: the class of the original cannot run; our own API runs it",
    "3": "our own API gives images only to the rows that name them",
    "4": "our own API refuses another number of images than of places",
    "5": "our own API answers every row of a batch as if it were alone",
    "6": "our own API never cuts a prompt silently",
    "8": "our own API takes pictures of different tile counts",
    "9": "our own API stops at a keyword as soon as it is there",
    "10": "our own API keeps special tokens out of the history",
    "12": "text typed by a person stays text in our own API",
    "13": "our own labels come from the template, not from counting tokens",
    "15": "our own API reads pictures of 1 and 3 pixels height, EXIF orientation and every mode",
    "window": "our own API keeps Mistral's sliding window, the original's transformers forgot it",
    "17": "our own API runs a trained projector with start and end tokens",
}


def _order(note: str) -> tuple[bool, int]:
    """Numbered quirks first."""
    return (False, int(note)) if note.isdigit() else (True, 0)


def collect(results: Iterable[Result]) -> dict[tuple[str, str, str], Cell]:
    """Results by (variant, op, path)."""
    cells: dict[tuple[str, str, str], Cell] = defaultdict(Cell)
    for result in results:
        cells[f"{result.set}/{result.variant}", result.op, result.path].add(result)
    return cells


def render(results: list[Result]) -> str:
    """The table, the notes it refers to, the failures, and one line with the sum."""
    cells = collect(results)
    width = max([len(variant) for variant, _, _ in cells] + [7])
    head = (
        f"{'variant':{width}}  {'op':20} {'through':7} {'passed':>6} {'failed':>6} {'skipped':>7}"
    )
    lines = [f"{head}  {'worst difference':30} differs", "-" * (len(head) + 41)]
    previous = ""
    for (variant, op, path), cell in cells.items():
        worst = f"{cell.worst:8.1e} {cell.worst_name}" if cell.worst_name else ""
        shown = variant if variant != previous else ""
        previous = variant
        lines.append(
            f"{shown:{width}}  {op:20} {path:7} {cell.passed:6} {cell.failed:6} {cell.skipped:7}"
            f"  {worst[:30]:30} {' '.join(sorted(cell.differs, key=_order))}".rstrip()
        )
    lines += _notes(cells) + _failures(results) + [summary(results)]
    return "\n".join(lines)


def _notes(cells: dict[tuple[str, str, str], Cell]) -> list[str]:
    used = sorted({number for cell in cells.values() for number in cell.differs}, key=_order)
    if not used:
        return []
    head = "differs: `llava.*` reproduces this quirk of the original, our own API is right:"
    return ["", head] + [f"  {number:>6}  {NOTES[number]}" for number in used]


def _failures(results: list[Result]) -> list[str]:
    failed = [r for r in results if r.status == "failed"]
    if not failed:
        return []
    lines = ["", "failed:"]
    for r in failed:
        lines.append(f"  {r.set}/{r.variant} {r.op} {r.case} ({r.path}): {r.reasons[0]}")
        lines += [f"      {reason}" for reason in r.reasons[1:4]]
        if len(r.reasons) > 4:
            lines.append(f"      and {len(r.reasons) - 4} more")
    return lines


def summary(results: list[Result]) -> str:
    """One line: how many passed, failed and were skipped, and how long it took."""
    count = {s: sum(r.status == s for r in results) for s in ("passed", "failed", "skipped")}
    seconds = sum(r.seconds for r in results)
    return (
        f"\n{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped "
        f"in {seconds:.0f} s"
    )


def as_json(results: list[Result]) -> str:
    """Every result, for programs."""
    rows: list[dict[str, Any]] = [vars(r) for r in results]
    return json.dumps({"results": rows}, ensure_ascii=False, indent=1)
