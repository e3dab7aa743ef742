"""Tables: RecBole's atomic files and Parquet, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lapilli.datasets.tables import read_table
from lapilli.errors import DataError


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_each_kind_of_column_is_read_as_what_it_is(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "a.item",
        "item_id:token\tclass:token_seq\tyear:float\tsize:float_seq\n7\tDrama War\t1995\t1 2.5\n"
        "x y\t\t1996.5\t\n",
    )
    table = read_table(path)
    assert len(table) == 2
    assert table.texts("item_id") == ["7", "x y"]
    assert table.lists("class") == [("Drama", "War"), ()]
    assert table.numbers("year").tolist() == [1995.0, 1996.5]
    assert table.columns["size"] == [(1.0, 2.5), ()]


def test_numbers_as_texts_have_no_point(tmp_path: Path) -> None:
    path = written(tmp_path, "a.inter", "u:float\n3\n2.5\n")
    assert read_table(path).texts("u") == ["3", "2.5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected a heading"),
        ("user_id\n1\n", "'user_id' is not name:kind"),
        ("user_id:tokens\n1\n", "'user_id:tokens' is not name:kind"),
        ("a:token\ta:float\n1\t2\n", "has a column twice"),
        ("a:token\tb:float\n1\n", r":2 has 1 fields, and the heading 2"),
        ("a:token\tb:float\n1\t2\n1\tx\n", r":3: column 'b' is float, found 'x'"),
        ("a:float_seq\n1 2\n1 y\n", r":3: column 'a' is float_seq, found '1 y'"),
    ],
)
def test_damaged_atomic_files_are_refused_with_their_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_table(written(tmp_path, "a.inter", text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.inter"
    path.write_bytes(b"a:token\n\xff\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_table(path)


def test_missing_columns_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a.user", "user_id:token\tage:token\n1\t24\n"))
    with pytest.raises(DataError, match="no column 'item_id': its columns are user_id, age"):
        table.texts("item_id")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a.inter", "t:float\n1\nnan\n"))
    with pytest.raises(DataError, match="row 2 of column 't' is no finite number"):
        table.numbers("t")


def test_text_is_no_number(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a.inter", "t:token\nten\n"))
    with pytest.raises(DataError, match="no column of numbers"):
        table.numbers("t")


def test_parquet_and_a_folder_of_it(tmp_path: Path) -> None:
    for part in range(2):
        rows = {"user_id": [part, part], "films": [["a", "b"], []], "name": ["x", "y"]}
        parquet.write_table(pa.table(rows), tmp_path / f"train-{part}.parquet")
    one, both = read_table(tmp_path / "train-0.parquet"), read_table(tmp_path)
    assert (len(one), len(both)) == (2, 4)
    assert both.texts("user_id") == ["0", "0", "1", "1"]
    assert both.lists("films") == [("a", "b"), (), ("a", "b"), ()]
    np.testing.assert_array_equal(both.numbers("user_id"), [0, 0, 1, 1])


def test_parquet_with_holes_or_other_columns_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"a": [1, None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2 of column 'a' is empty"):
        read_table(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"b": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="has the columns b, and"):
        read_table(tmp_path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "a.inter")
    with pytest.raises(DataError, match="expected a file that ends in"):
        read_table(written(tmp_path, "a.txt", "x"))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_table(written(tmp_path, "a.parquet", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Parquet file"):
        read_table(tmp_path / "empty")
