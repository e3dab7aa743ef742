"""The tower's benchmark: every format and way is measured, and features stay close to float32."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import tower


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"float32_per_s": 1e9, "bfloat16_per_s": 2e9, "int8_per_s": 4e9}
    monkeypatch.setattr(tower, "measure_limits", lambda **_: peaks)
    monkeypatch.setattr(tower, "SIDE", 56)


@pytest.mark.usefixtures("quick")
def test_every_format_runs_both_ways(tmp_path: Path) -> None:
    out = tmp_path / "tower.json"
    given = ["--shape", "tiny", "--repeats", "1", "--out", str(out), "--threads", "1"]
    tower.main([*given, "--tiles", "1", "--parts"])
    tower.main([*given, "--tiles", "2", "--formats", "int8 g32"])
    report = json.loads(out.read_text())["1 threads"]
    names = {f"{name}, {way}" for name in tower.FORMATS for way in ("modules", "one call")}
    assert report["1 tiles"].keys() == names
    assert report["2 tiles"].keys() == {"int8 g32, modules", "int8 g32, one call"}
    for name, row in report["1 tiles"].items():
        assert row["share"] == pytest.approx(row["per_s"] / 4e9)
        own = 1e9 if "float32" in name else 2e9 if "bfloat16" in name else 4e9
        assert row["share_of_own"] == pytest.approx(row["per_s"] / own)
        assert row["apart_worst"] < (1e-4 if "float32" in name else 0.05)
    assert report["parts_ms"].keys() == set(tower.FORMATS)
    assert all(value > 0 for parts in report["parts_ms"].values() for value in parts.values())
    assert report["prepare_ms"] > 0


def test_features_are_compared_vector_by_vector() -> None:
    truth = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    found = tower.apart(torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), truth)
    assert found["apart_worst"] == pytest.approx(2**0.5)
    assert found["apart_mean"] == pytest.approx(2**0.5 / 2)
    assert (found["cosine_mean"], found["cosine_worst"]) == (pytest.approx(0.5), pytest.approx(0.0))
