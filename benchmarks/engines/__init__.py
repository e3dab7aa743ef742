"""One file per engine: `load(options) -> Timed | MeasuresItself` (figures.py)."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """What every engine is told.

    Attributes:
        files: the directory of the shape, with `float`, `int4`, `gguf` ... in it.
        kind: number format, by the engine's own name for it.
        threads: of all computations.
        positions: longest sequence.
        programs: the folder of an engine that is a program and no package.
    """

    files: Path
    kind: str
    threads: int
    positions: int = 1024
    programs: Path | None = None
