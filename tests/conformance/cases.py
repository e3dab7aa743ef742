"""Golden cases as they lie on disk: sets, variants, cases, arrays. Knows files, no lapilli."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One golden case: what the original was given and what it answered."""

    id: str
    op: str
    given: dict[str, Any]
    expect: dict[str, Any]
    arrays: Mapping[str, np.ndarray]

    @property
    def raises(self) -> str | None:
        """The name of the exception of the original, if it raised one."""
        return self.expect.get("exception")


@dataclass(frozen=True)
class Variant:
    """One directory of cases: a model (with a spec) or a collection without one (no spec)."""

    set: str
    name: str
    path: Path
    root: Path
    spec: dict[str, Any] | None = field(repr=False)

    @property
    def images(self) -> Path:
        return self.root / "images" / self.set

    @property
    def assets(self) -> Path:
        return self.root / "assets"

    @cached_property
    def cases(self) -> list[Case]:
        text = (self.path / "cases.json").read_text(encoding="utf-8")
        stored = self.path / "arrays.npz"
        arrays: dict[str, np.ndarray] = {}
        if stored.exists():
            with np.load(stored) as archive:
                arrays = dict(archive)
        return [
            Case(
                id=entry["id"],
                op=entry["op"],
                given=entry["input"],
                expect=entry["expect"],
                arrays={name: arrays[f"{entry['id']}/{name}"] for name in entry.get("arrays", [])},
            )
            for entry in json.loads(text)["cases"]
        ]


def find_variants(root: Path) -> Iterator[Variant]:
    """Every variant of every set under `root`/cases, in the order of their names."""
    for found in sorted(root.glob("cases/*/*/cases.json")):
        spec = found.parent / "spec.json"
        yield Variant(
            set=found.parent.parent.name,
            name=found.parent.name,
            path=found.parent,
            root=root,
            spec=json.loads(spec.read_text(encoding="utf-8")) if spec.exists() else None,
        )
