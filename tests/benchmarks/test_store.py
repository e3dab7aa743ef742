"""The store's benchmark runs, and says of every size what was asked."""

import json
from pathlib import Path

import pytest

from benchmarks import store


def test_every_figure_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DRAWS", 3)
    monkeypatch.setattr(store, "PIECE", 300)
    out = tmp_path / "store.json"
    store.main(["--sizes", "500x8", "--dtypes", "float16,int8", "--out", str(out)])
    report = json.loads(out.read_text())["500x8"]
    assert set(report) == {"float16", "int8", "LMDB, float16"}
    for name in ("float16", "int8"):
        assert all(value > 0 for value in report[name].values())
        assert report[name]["bytes"] > report[name]["bytes_of_vectors"]
