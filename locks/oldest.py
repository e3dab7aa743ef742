"""Print the lower bounds of a pyproject.toml as exact pins, for `make test-oldest`.

torch is left out: constraints.txt holds it, as another one is a download of gigabytes.
"""

import re
import sys
import tomllib
from pathlib import Path


def lower_bounds(project: dict[str, object]) -> list[str]:
    """Return "name==version" for every requirement with a lower bound, extras included."""
    extras = project.get("optional-dependencies", {})
    requirements = [*project["dependencies"], *(one for group in extras.values() for one in group)]
    found = (re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", one) for one in requirements)
    return sorted({f"{m[1]}=={m[2]}" for m in found if m and m[1] != "torch"})


if __name__ == "__main__":
    print("\n".join(lower_bounds(tomllib.loads(Path(sys.argv[1]).read_text())["project"])))
