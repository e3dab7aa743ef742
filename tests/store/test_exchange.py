"""Exchange: what goes out comes in again, and strangers' files are read or refused by name."""

import importlib.util

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from lapilli.errors import ConfigError, StoreError
from lapilli.store import Stamp, Store, StoreWriter
from lapilli.store.exchange import export_store, import_store
from tests.store.conftest import vectors_of, write

needs_lance = pytest.mark.skipif(
    importlib.util.find_spec("lance") is None, reason="pylance is not installed"
)
FORMS = ["parquet", "arrow", "npy", pytest.param("lance", marks=needs_lance)]


@pytest.fixture
def wide(tmp_path):
    path = tmp_path / "wide"
    write(path, ["ü", 2, "c"], vectors_of(3, 2), ["t", "u", "v"], projector="proj", dtype="float32")
    return Store.open(path)


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(wide, tmp_path, form):
    seen = []
    file = export_store(wide, tmp_path / "out", form, progress=seen.append)
    assert file == tmp_path / f"out.{form}"
    assert seen == [3]
    options = {"encoder": "enc-1", "projector": "proj"} if form == "npy" else {}
    assert import_store(file, tmp_path / "back", dtype="float32", **options) == 3
    back = Store.open(tmp_path / "back", encoder="enc-1", projector="proj")
    assert back.ids() == wide.ids()
    assert torch.equal(back.get(back.ids()), vectors_of(3, 2))
    assert back.stamps() == [Stamp(encoder="enc-1", projector="proj")]
    if form != "npy":
        assert back.hashes(back.ids()) == wide.hashes(wide.ids())
        assert import_store(file, tmp_path / "back") == 0
    with pytest.raises(StoreError, match="is there already: remove it"):
        export_store(wide, file, form)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_tables_of_others(tmp_path, kind, nested, fixed):
    rows = vectors_of(3, 2).tolist() if nested else vectors_of(3, 2).flatten(1).tolist()
    if nested:
        shape = pa.list_(pa.list_(kind, 4), 2) if fixed else pa.list_(pa.list_(kind))
    else:
        shape = pa.list_(kind, 8) if fixed else pa.list_(kind)
    if kind == pa.float16():
        rows = _halves(rows)
    table = pa.table({"sku": [1, 2, 3], "emb": pa.array(rows, shape)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    options = {"encoder": "e", "columns": ("sku", "emb"), "dtype": "float32"}
    import_store(tmp_path / "a.parquet", tmp_path / "s", tokens=2, **options)
    assert torch.equal(Store.open(tmp_path / "s").get([1, 2, 3]), vectors_of(3, 2))


def _halves(rows):
    return [
        [_halves([r])[0] if isinstance(r, list) else np.float16(r) for r in row] for row in rows
    ]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"id": ["a"], "v": [[1.0]]}, "has the columns id, v: expected 'vector'; the options"),
        ({"id": ["a"], "vector": ["x"]}, "'vector' is string: expected lists of floating"),
        ({"id": ["a"], "vector": [[1, 2]]}, "expected lists of floating"),
        ({"id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, r"vectors have \[1, 2\] numbers"),
        ({"id": ["a", "b"], "vector": [[1.0], None]}, "a 'vector' is missing"),
        ({"id": ["a"], "vector": [[1.0, None]]}, "expected lists of floating"),
        ({"id": ["a"], "vector": [[1.0, float("nan")]]}, "id 'a' has a NaN"),
        ({"id": [None], "vector": [[1.0]]}, "an id is None"),
        ({"id": ["a", "a"], "vector": [[1.0], [2.0]]}, "id 'a' comes twice"),
        ({"id": ["a"], "vector": [[1.0, 2.0, 3.0]]}, r"entries are \[3\] numbers, which are not 2"),
    ],
)
def test_tables_that_are_refused(tmp_path, columns, says):
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match=says):
        import_store(
            tmp_path / "a.parquet",
            tmp_path / "s",
            encoder="e",
            tokens=2 if "not 2" in says else None,
        )


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.npy"])
def test_files_that_are_refused(tmp_path, name):
    with pytest.raises(StoreError, match="is not there: expected a file of ids"):
        import_store(tmp_path / name, tmp_path / "s", encoder="e")
    (tmp_path / name).write_bytes(b"PAR1 or so")
    (tmp_path / "a.ids.txt").write_text("a\n")
    with pytest.raises(StoreError, match="cannot be read"):
        import_store(tmp_path / name, tmp_path / "s", encoder="e")
    with pytest.raises(StoreError, match="expected a file that ends in parquet, arrow"):
        import_store(tmp_path / "a.txt", tmp_path / "s", encoder="e")


def test_arrays_that_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 4), "f4"))
    with pytest.raises(StoreError, match=r"a.ids.txt is not there: expected an id a line"):
        import_store(tmp_path / "a.npy", tmp_path / "s", encoder="e")
    (tmp_path / "a.ids.txt").write_text("a\nb\nc\n")
    with pytest.raises(StoreError, match=r"float32 .2, 4., and .* has 3 ids: expected"):
        import_store(tmp_path / "a.npy", tmp_path / "s", encoder="e")
    (tmp_path / "a.ids.txt").write_bytes(b"a\r\nb\r\n")
    assert import_store(tmp_path / "a.npy", tmp_path / "s", encoder="e") == 2
    assert Store.open(tmp_path / "s").ids() == ["a", "b"]
    np.save(tmp_path / "p.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "p.ids.txt").write_text("a\n")
    with pytest.raises(StoreError, match="cannot be read"):
        import_store(tmp_path / "p.npy", tmp_path / "t", encoder="e")


def test_what_cannot_be_exported(wide, tmp_path):
    with pytest.raises(StoreError, match="form 'usearch': expected one of parquet"):
        export_store(wide, tmp_path / "out", "usearch")
    write(wide.path, ["line\nbreak"], vectors_of(1, 2), projector="proj")
    with pytest.raises(StoreError, match="has a line break: export to parquet or arrow"):
        export_store(Store.open(wide.path), tmp_path / "out", "npy")
    write(wide.path, ["new"], vectors_of(1, 2), encoder="enc-2")
    with pytest.raises(StoreError, match="entries of 2 encoders or projectors"):
        export_store(Store.open(wide.path), tmp_path / "out", "parquet")
    with StoreWriter(tmp_path / "empty", encoder="e", width=4):
        pass
    with pytest.raises(StoreError, match="has no entries to export"):
        export_store(Store.open(tmp_path / "empty"), tmp_path / "out", "npy")
    parquet.write_table(pa.table({"id": ["a"], "vector": [[1.0]]}), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match="does not say what made its vectors: name it"):
        import_store(tmp_path / "a.parquet", tmp_path / "s")


def test_missing_packages_are_named(wide, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ConfigError, match=r"Lance needs pylance: install lapilli\[lance\]"):
        export_store(wide, tmp_path / "out", "lance")
    (tmp_path / "x.lance").mkdir()
    with pytest.raises(ConfigError, match="Lance needs pylance"):
        import_store(tmp_path / "x.lance", tmp_path / "s", encoder="e")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"need pyarrow: install lapilli\[data\]"):
        export_store(wide, tmp_path / "out", "parquet")
