"""Who takes part, and what is said of those who do not."""

import sys
from pathlib import Path

import pytest

from benchmarks import contest
from benchmarks.contest import ENGINES, TOO_LARGE, chosen
from benchmarks.quality import IK, LLAMA, OURS


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(python: str, package: str) -> str | None:
        return None if package == "openvino-genai" else "1"

    monkeypatch.setattr(contest, "package_version", version)


@pytest.mark.usefixtures("installed")
def test_everybody_who_is_installed_takes_part(tmp_path: Path) -> None:
    found, skipped = chosen([], "S", sys.executable, "peers", _programs(tmp_path))
    assert skipped == {"OpenVINO GenAI Q4_0, text alone": "openvino-genai is not installed"}
    assert len(found) == len(ENGINES) - 1
    [ik] = [engine for engine in found if engine.kind == "IQ4_KS"]
    assert ik.arguments(tmp_path, tmp_path)[-2:] == ["--ik", str(tmp_path)]
    assert "--ik" not in found[0].arguments(tmp_path, tmp_path)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("built", "why"), [(None, "--ik names no folder"), ("llama-bench", "has no llama-quantize")]
)
def test_programs_that_are_not_built_are_named(tmp_path: Path, built: str | None, why: str) -> None:
    folder = None if built is None else _programs(tmp_path, built)
    found, skipped = chosen([], "S", sys.executable, "peers", folder)
    named = [reason for name, reason in skipped.items() if name.startswith("ik_llama.cpp ")]
    assert len(named) == 4
    assert all(why in reason for reason in named)
    assert not any(engine.is_program for engine in found)


def _programs(folder: Path, *names: str) -> Path:
    for name in names or contest.PROGRAMS:
        (folder / name).touch()
    return folder


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


def test_the_kind_of_a_gguf_file_is_known_of_those_who_read_one() -> None:
    kinds = {engine.name: engine.gguf_kind for engine in ENGINES}
    assert kinds["llama.cpp Q4_0, no flash attention"] == kinds["llama.cpp Q4_0"] == "Q4_0"
    assert kinds["ik_llama.cpp IQ4_K, text alone"] == "IQ4_K"
    assert kinds["lapilli int4"] is None


def test_every_format_that_rounds_is_measured_by_quality() -> None:
    measured = {*OURS, *(f"ik_llama.cpp {kind}" for kind in IK), *(f"llama.cpp {k}" for k in LLAMA)}
    assert {engine.format for engine in ENGINES} - {""} <= measured


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert contest.package_version(sys.executable, "lapilli")
    assert contest.package_version(sys.executable, "no-such-package-here") is None
