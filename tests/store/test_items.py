"""Items: the same from every kind of file, or the line that is wrong."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from lapilli.errors import StoreError
from lapilli.store.items import ItemFile

ITEMS = [("1", "a red square"), ("x", 'with "quotes", commas\nand lines'), ("ü", "unicode ✓")]


def written(path, items=ITEMS, names=("id", "text")):
    rows = [dict(zip(names, item, strict=True)) for item in items]
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    else:
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *items])
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl"])
def test_every_kind_of_file(tmp_path, kind):
    file = ItemFile(written(tmp_path / f"items.{kind}"))
    assert list(file) == ITEMS
    assert list(file) == ITEMS  # again
    assert len(file) == 3
    other = written(tmp_path / f"other.{kind}", names=("sku", "title"))
    assert list(ItemFile(other, id_column="sku", text_column="title")) == ITEMS


def test_numbers_are_ids(tmp_path):
    path = written(tmp_path / "items.parquet", [(3, "a"), (4, "b")])
    assert list(ItemFile(path)) == [("3", "a"), ("4", "b")]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([("a", "t"), ("b", "u"), ("a", "v")], "id 'a' comes twice"),
        ([("a", "t"), ("", "u")], ":[23] has no 'id': give it an id"),
        ([("a", "t"), ("b", "")], ":[23]: 'text' is '': expected a text"),
    ],
)
def test_wrong_items(tmp_path, kind, items, says):
    with pytest.raises(StoreError, match=says):
        ItemFile(written(tmp_path / f"items.{kind}", items))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_missing_columns(tmp_path, kind):
    with pytest.raises(StoreError, match="has the columns 'id', 'title': expected 'text'; the opt"):
        ItemFile(written(tmp_path / f"items.{kind}", names=("id", "title")))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"", "expected a file that ends in .parquet, .csv, .tsv, .jsonl"),
        ("a.jsonl", b'{"id": 1, "text": "a"}\n{"id":\n', "a.jsonl:2 is no JSON"),
        ("a.jsonl", b"[1]\n", "expected an object"),
        ("a.jsonl", b'{"id": 1.5, "text": "a"}\n', ":1: an id is 1.5"),
        ("a.csv", b'id,text\n1,"open\n', "no table in UTF-8"),
        ("a.csv", b"id,text\n1,\xff\n", "no table in UTF-8"),
        ("a.csv", b"", "has the columns none"),
        ("a.csv", b"id,text\n1\n", "'text' is None: expected a text"),
        ("a.parquet", b"PAR1", "no whole Parquet file"),
    ],
)
def test_damaged_files(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StoreError, match=says):
        ItemFile(tmp_path / name)
    with pytest.raises(StoreError, match="is no file"):
        ItemFile(tmp_path / "nothing.csv")
