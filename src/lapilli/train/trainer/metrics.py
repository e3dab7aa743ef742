"""Where a run's numbers go: one JSON object per line; knows no model.

A run that resumes drops the lines after its checkpoint, so that a killed run leaves the same log as
an undisturbed one.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from lapilli.config.json_text import parse_json
from lapilli.errors import CheckpointError
from lapilli.train.trainer.contract import TrainingError

Record = Mapping[str, int | float]
TIMED: Final = frozenset({"per_s", "gib"})
"""What two runs of the same bits still measure differently."""
_LONGEST: Final = 1 << 20
"""Bytes of a line; the longest that is written has a thousandth of it."""


class RunLog:
    """Appends records to `folder/log.jsonl`, and keeps a progress line for people."""

    def __init__(self, folder: Path, *, echo: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self._echo = echo

    def rewind(self, step: int) -> None:
        """Forget every record after this step."""
        if not self.path.exists():
            return
        found = self.records()
        kept = [record for record in found if record["step"] <= step]
        if len(kept) == len(found) and self.path.read_bytes().endswith(b"\n"):
            return
        staged = self.path.with_suffix(".part")
        staged.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        staged.replace(self.path)

    def write(self, record: Record) -> None:
        """One more line.

        Raises:
            TrainingError: the disk does not take it.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written ({error}): make room and start the same command "
                "again; the run goes on from its last checkpoint"
            ) from error
        if self._echo:
            self.say(self.line(record))

    @staticmethod
    def say(text: str) -> None:
        """One line on standard error."""
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))

    def sync(self) -> None:
        """Everything written so far survives a power cut."""
        if self.path.exists():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    def records(self) -> list[Record]:
        """All lines so far; a last line that a kill cut short is left out.

        Raises:
            TrainingError: a line is no JSON.
        """
        if not self.path.exists():
            return []
        found: list[Record] = []
        with self.path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, _LONGEST + 1), b""), 1):
                if len(line) > _LONGEST:
                    raise self._damaged(number, f"more than {_LONGEST} bytes")
                if line.endswith(b"\n") and line != b"\n":
                    found.append(self._record(number, line))
        return found

    def _record(self, number: int, line: bytes) -> Record:
        try:
            found = parse_json(line, f"line {number}")
        except CheckpointError as error:
            raise self._damaged(number, str(error)) from error
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise self._damaged(number, "expected an object with a step")
        return found

    def _damaged(self, number: int, what: str) -> TrainingError:
        return TrainingError(
            f"{self.path}:{number} is damaged ({what}): delete the line and start again"
        )

    @staticmethod
    def line(record: Record) -> str:
        """A record for people."""
        parts = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in record.items()
        )
        return "  ".join(parts)
