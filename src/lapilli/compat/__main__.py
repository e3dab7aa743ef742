"""Command line that runs a program which was written against the original, unchanged.

python -m lapilli.compat SCRIPT ARGS...
python -m lapilli.compat -m MODULE ARGS...
"""

import runpy
import sys
from pathlib import Path

from lapilli.compat import install, why_no_names
from lapilli.errors import LapilliError

USAGE = "usage: python -m lapilli.compat SCRIPT [ARGS...] | -m MODULE [ARGS...]"


def main(arguments: list[str]) -> None:
    """Install the names of the original and run a script or a module in this process.

    Raises:
        SystemExit: nothing to run was named, the script is not there, transformers is not
            installed, or a module of the original cannot do what it is asked for (code 2).
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
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except LapilliError as error:
            raise SystemExit(_refuse(f"{name}: {error}")) from error
        return
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(_refuse(f"lapilli.compat: no script at {script}"))
    install()
    sys.argv = arguments
    # As `python SCRIPT` does: modules beside the script come first.
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


def _refuse(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 2


if __name__ == "__main__":
    main(sys.argv[1:])
