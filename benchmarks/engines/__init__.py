"""One file per engine: `load(files, options) -> Timed` (figures.py)."""

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
    """

    files: Path
    kind: str
    threads: int
    positions: int = 1024
