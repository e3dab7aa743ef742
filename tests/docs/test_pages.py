"""What pages of the guide have to say."""

import re

from lapilli.media.download import FetchLimits
from tests.conftest import REPOSITORY

GUIDE = REPOSITORY / "docs" / "guide"


def test_the_guide_says_how_much_of_a_source_is_read() -> None:
    page = (GUIDE / "pictures.md").read_text("utf-8")
    assert f"Whatever the source is, {FetchLimits().max_bytes >> 20} MiB are read" in page
    rows = [row for row in page.splitlines() if row.startswith("| `http")]
    assert rows
    assert not any("MiB" in row for row in rows)


def test_the_guide_goes_from_parts_to_an_answer() -> None:
    page = (GUIDE / "build.md").read_text("utf-8")
    lines = re.findall(r"^\$ (.+)$", page, re.MULTILINE)  # each is run by test_code_blocks
    steps = ("python tiny_llama", "lapilli build .*--vision pebble", "lapilli train", "lapilli ask")
    found = [next(n for n, line in enumerate(lines) if re.search(step, line)) for step in steps]
    assert found == sorted(found)
    assert "bfloat16" in page
