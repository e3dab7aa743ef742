"""Footprint of one question: how many of lapilli's own files its answer executes.

    python -m benchmarks.footprint [MODEL] [PICTURE]

Counted are files under src/lapilli of which at least one function runs, once between start and end
of `lapilli.load`, and once of `Chat.ask`. What runs when a file is imported (its own lines and the
bodies of its classes) is counted apart, as files imported: a reader who follows a question has to
read the functions that it calls. Functions that dataclasses write have no file and are not seen.
"""

import argparse
import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

import lapilli

ROOT = Path(lapilli.__file__).parent
T = TypeVar("T")


def watch(work: Callable[[], T]) -> tuple[T, set[str], set[str]]:
    """Return what `work` returns, files of ours of which a function ran, and files imported."""
    executed: set[str] = set()
    imported: set[str] = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            is_function = code.co_flags & inspect.CO_OPTIMIZED  # no module and no class body
            (executed if is_function else imported).add(code.co_filename)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        result = work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return result, _ours(executed), _ours(imported)


def _ours(files: set[str]) -> set[str]:
    return {str(Path(file).relative_to(ROOT)) for file in files if Path(file).is_relative_to(ROOT)}


def main() -> None:
    """Print the counts, and with --names the files."""
    parser = argparse.ArgumentParser(description="Count the files that one question executes.")
    parser.add_argument("model", nargs="?", default="pebble")
    parser.add_argument("picture", nargs="?", default="examples/picture.png")
    parser.add_argument("--names", action="store_true", help="print the files too")
    asked = parser.parse_args()
    chat, load, imported = watch(lambda: lapilli.load(asked.model, device="cpu"))
    _, answer, _ = watch(lambda: chat.ask("What is in this picture?", asked.picture))
    print(f"load: functions of {len(load)} files run, {len(imported)} files imported")
    print(f"answer: functions of {len(answer)} files run; both: {len(load | answer)}")
    for name, files in (("load", load), ("answer", answer)):
        for file in sorted(files) if asked.names else ():
            print(f"{name:8}{file}")


if __name__ == "__main__":
    main()
