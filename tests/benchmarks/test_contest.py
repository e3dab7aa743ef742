"""Who takes part, and what is said of those who do not."""

import sys

import pytest

from benchmarks import contest
from benchmarks.contest import ENGINES, TOO_LARGE, chosen


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(python: str, package: str) -> str | None:
        return None if package == "openvino-genai" else "1"

    monkeypatch.setattr(contest, "package_version", version)


@pytest.mark.usefixtures("installed")
def test_everybody_who_is_installed_takes_part() -> None:
    found, skipped = chosen([], "S", sys.executable, "peers")
    assert skipped == {"OpenVINO GenAI Q4_0, text alone": "openvino-genai is not installed"}
    assert len(found) == len(ENGINES) - 1


@pytest.mark.usefixtures("installed")
def test_engines_are_chosen_by_the_beginning_of_their_names() -> None:
    found, skipped = chosen(["lapilli int", "llama.cpp Q4_0"], "S", sys.executable, "peers")
    assert [engine.name for engine in found] == [
        "lapilli int4",
        "llama.cpp Q4_0",
        "llama.cpp Q4_0, no flash attention",
        "lapilli int8",
    ]
    assert skipped["transformers float32"] == "not asked for"


@pytest.mark.usefixtures("installed")
def test_what_does_not_fit_is_said() -> None:
    _, skipped = chosen([], "L", sys.executable, "peers")
    assert skipped["lapilli float32"] == skipped["transformers float32"] == TOO_LARGE


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert contest.package_version(sys.executable, "lapilli")
    assert contest.package_version(sys.executable, "no-such-package-here") is None
