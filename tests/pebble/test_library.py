"""pebble uses lapilli as any program may: by names without an underscore, and never the reverse."""

import ast
from pathlib import Path

import pytest

import lapilli
import pebble

OURS = sorted(Path(pebble.__path__[0]).glob("*.py"))
LIBRARY = sorted(Path(lapilli.__file__).parent.rglob("*.py"))


def imports(path):
    """Every module and name that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_only_public_names_of_lapilli_are_used(path):
    used = [name for name in imports(path) if name.partition(".")[0] == "lapilli"]
    assert [name for name in used if "._" in name] == []


def test_lapilli_does_not_know_its_making():
    assert len(LIBRARY) > 100
    found = {path.name for path in LIBRARY for name in imports(path) if name.startswith("pebble")}
    assert found == set()
