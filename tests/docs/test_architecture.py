"""What docs/architecture.md and CONTRIBUTING.md name is there."""

import re
from pathlib import Path

import pytest

from tests.docs.test_code_blocks import REPOSITORY

SOURCE = REPOSITORY / "src" / "lapilli"
# Names of files that a reader is asked to make.
OPEN = re.compile(r"NAME|\*")


def places(page: str) -> set[str]:
    """Paths of Python files in a page, those inside of code too."""
    found = re.findall(r"[\w./*-]*\w\.py\b", (REPOSITORY / page).read_text("utf-8"))
    return {name for name in found if not OPEN.search(name)}


def exists(name: str) -> bool:
    return (REPOSITORY / name).is_file() or any(
        f"/{path.relative_to(SOURCE).as_posix()}".endswith(f"/{name}")
        for path in SOURCE.rglob(Path(name).name)
    )


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(page: str) -> None:
    named = places(page)
    assert len(named) > 5
    assert [name for name in sorted(named) if not exists(name)] == []


def test_the_rooms_of_the_picture_are_those_of_the_package() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text("utf-8")
    picture = page.partition("## The rooms")[2].partition("```text")[2].partition("```")[0]
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert [room for room in sorted(rooms) if not re.search(rf"\b{room}\b", picture)] == []
