"""Command line that runs a program which was written against the original, unchanged.

python -m lapilli.compat SCRIPT ARGS...
python -m lapilli.compat -m MODULE ARGS...
"""

import importlib.util
import runpy
import sys
import zipfile
from pathlib import Path

from lapilli.compat import install, programs, why_no_names
from lapilli.errors import LapilliError

_START = 1 << 16  # bytes of a file that are looked at

USAGE = "usage: python -m lapilli.compat SCRIPT [ARGS...] | -m MODULE [ARGS...]"


def main(arguments: list[str]) -> None:
    """Install the names of the original and run a script or a module in this process.

    Raises:
        SystemExit: nothing to run was named, there is no such module or script, transformers is
            not installed, or a module of the original cannot do what it is asked for (code 2).
    """
    is_module = arguments[:1] == ["-m"] and len(arguments) > 1
    if not is_module and (not arguments or arguments[0].startswith("-")):
        raise SystemExit(_refuse(USAGE))
    missing = why_no_names()
    if missing is not None:
        raise SystemExit(_refuse(f"lapilli.compat: {missing}"))
    if is_module:
        install()
        name, sys.argv = arguments[1], arguments[1:]
        obstacle = _why_no_module(name)
        if obstacle is not None:
            raise SystemExit(_refuse(f"lapilli.compat: {obstacle}"))
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except LapilliError as error:
            raise SystemExit(_refuse(f"{name}: {error}")) from error
        return
    script = Path(arguments[0])
    obstacle = _why_no_script(script)
    if obstacle is not None:
        raise SystemExit(_refuse(f"lapilli.compat: {obstacle}"))
    install()
    sys.argv = arguments
    # As `python SCRIPT` does: modules beside the script come first.
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


def _why_no_module(name: str) -> str | None:
    """Return in one line why a module cannot be run; None: it can be.

    What the module's own packages raise when they are imported is theirs, and passes.
    """
    there_are = f"the programs of the original here are {', '.join(programs())}"
    if name.partition(".")[0] == "llava":
        return None if name in programs() else f"{name} is no program: {there_are}"
    if not all(name.split(".")):
        return f"{name!r} is no name of a module: {there_are}"
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                return f"{name} is a package without __main__: name one of its modules"
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    if spec is None:
        return f"there is no module {name}, here or installed; {there_are}"
    if getattr(spec.loader, "get_code", lambda _: None)(spec.name) is None:
        return f"the module {name} is not written in Python and cannot be run; {there_are}"
    return None


def _why_no_script(script: Path) -> str | None:
    """Return in one line why a file cannot be run; None: it is tried."""
    if not script.is_file():
        return f"no script at {script}"
    try:
        with script.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        return f"{script} cannot be read: {error.strerror}"
    if start.startswith(importlib.util.MAGIC_NUMBER):
        return None
    if start.startswith(b"PK") and zipfile.is_zipfile(script):
        with zipfile.ZipFile(script) as archive:
            if "__main__.py" in archive.namelist():
                return None
        return f"{script} is an archive without __main__.py: give a Python program"
    if b"\0" in start:
        return f"{script} is no Python program: it begins with {start[:8]!r} and has null bytes"
    return None


def _refuse(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 2


if __name__ == "__main__":
    main(sys.argv[1:])
