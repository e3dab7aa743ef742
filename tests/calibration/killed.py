"""A run that ends itself with SIGKILL at a chosen moment; in a process of its own."""

import os
import signal
from pathlib import Path

from tests.calibration.conftest import quantized


def run_until(moment: int, source: str, target: str, options: dict[str, object]) -> None:
    """Quantize, and die before the file of this number takes its name."""
    rename, done = Path.replace, 0

    def counted(self: Path, to: Path) -> Path:
        nonlocal done
        if done == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return rename(self, to)

    Path.replace = counted  # type: ignore[method-assign]
    quantized(source, Path(target), options)
