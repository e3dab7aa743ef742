"""Texts by id: the same from every kind of file, or the line that is wrong."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from lapilli.datasets.texts import TextFile
from lapilli.errors import DataError

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
    file = TextFile(written(tmp_path / f"items.{kind}"))
    assert list(file) == ITEMS
    assert list(file) == ITEMS  # again
    assert len(file) == 3
    other = written(tmp_path / f"other.{kind}", names=("sku", "title"))
    assert list(TextFile(other, id_column="sku", text_column="title")) == ITEMS


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_numbers_are_ids(tmp_path, kind):
    path = written(tmp_path / f"items.{kind}", [(3, "a"), (4, "b")])
    assert list(TextFile(path)) == [(3, "a"), (4, "b")]


def test_a_number_and_its_text_are_one_id(tmp_path):
    with pytest.raises(DataError, match=":3: id '7' comes twice, first in line 1"):
        TextFile(written(tmp_path / "items.jsonl", [(7, "a"), ("8", "b"), ("7", "c")]))


def test_marks_and_other_columns_are_read_over(tmp_path):
    (tmp_path / "a.csv").write_text('\ufefftext,id,more\n"one, two",1,x\n', encoding="utf-8")
    assert list(TextFile(tmp_path / "a.csv")) == [("1", "one, two")]


def test_a_field_too_many_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\nx,y\na,b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a.csv:3 has 3 fields, and the table has 2 columns: put"):
        TextFile(tmp_path / "a.csv")


def test_a_file_that_changes_meanwhile_is_said(tmp_path):
    path = written(tmp_path / "items.jsonl")
    file = TextFile(path)
    path.write_text("{")
    with pytest.raises(DataError, match=":1 is no JSON"):
        list(file)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(file)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([("a", "t"), ("b", "u"), ("a", "v")], ":[34]: id 'a' comes twice, first in line [12]"),
        ([("a", "t"), ("", "u")], ":[23] has no 'id': give it an id"),
        ([("a", "t"), ("b", "")], ":[23]: 'text' is '': expected a text"),
    ],
)
def test_wrong_items(tmp_path, kind, items, says):
    with pytest.raises(DataError, match=says):
        TextFile(written(tmp_path / f"items.{kind}", items))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_missing_columns(tmp_path, kind):
    with pytest.raises(DataError, match="has the columns 'id', 'title': expected 'text'; the opt"):
        TextFile(written(tmp_path / f"items.{kind}", names=("id", "title")))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"", "expected a file that ends in .jsonl, .csv, .tsv, .parquet"),
        ("a.jsonl", b'{"id": 1, "text": "a"}\n{"id":\n', "a.jsonl:2 is no JSON"),
        ("a.jsonl", b"[1]\n", "expected an object"),
        ("a.jsonl", b'{"id": 1.5, "text": "a"}\n', ":1: 'id' is 1.5: expected a text or a whole"),
        ("a.jsonl", b'{"id": true, "text": "a"}\n', ":1: 'id' is True: expected"),
        ("a.jsonl", b'{"id": 1, "text": " "}\n', ":1: 'text' is ' ': expected a text"),
        ("a.jsonl", b'{"id": 1, "text": 5}\n', ":1: 'text' is 5: expected a text"),
        (
            "a.jsonl",
            rb'{"id": "\ud800", "text": "a"}',
            r":1: 'id' is '\\ud800', which UTF-8 cannot",
        ),
        (
            "a.jsonl",
            rb'{"id": 1, "text": "\ud800"}',
            r":1: 'text' is '\\ud800', which UTF-8 cannot",
        ),
        ("a.jsonl", b"\n", "is empty: expected rows with an id and a text"),
        ("a.csv", b"id,text\n", "is empty"),
        ("a.csv", b'id,text\n1,"open\n', "no table in UTF-8"),
        ("a.csv", b"id,text\n1,\xff\n", "no table in UTF-8"),
        ("a.csv", b"", "has the columns none"),
        ("a.csv", b"id,text\n1\n", "'text' is None: expected a text"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_damaged_files(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        TextFile(tmp_path / name)
    with pytest.raises(DataError, match="is no file"):
        TextFile(tmp_path / "nothing.csv")
