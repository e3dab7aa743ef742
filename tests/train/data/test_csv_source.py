"""Tables become conversations of one turn; what is no such table is refused with its place."""

import base64
import csv

import pytest

from lapilli.errors import DataError
from lapilli.train.data import open_dataset, open_source
from lapilli.train.recipe import SourceRecipe


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding=encoding)
    return SourceRecipe(path=str(path))


def test_rows_are_questions_about_pictures(tmp_path):
    text = 'image,question,answer,by\na.png,"What, and\nwhere?",A boat.,me\n,Hello?,Hi.,you\n'
    source = open_source(table(tmp_path, text, "utf-8-sig"))  # as a spreadsheet writes it
    assert len(source) == 2
    assert source.record(0) == {
        "id": "1",
        "image": "a.png",
        "question": "What, and\nwhere?",
        "answer": "A boat.",
    }
    assert source.record(1) == {"id": "2", "image": "", "question": "Hello?", "answer": "Hi."}
    assert [source.where(i).rpartition(":")[2] for i in range(2)] == ["2", "4"]
    assert source.media(0, "a.png") == tmp_path / "a.png"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_any_spreadsheet(tmp_path, separator, end):
    """Separators by language, line ends by system, empty lines and cells at the end."""
    lines = ("Image ,ID,Question,Answer,", 'a.png,x,What?,"A""b""",', "", 'b.png,y,Where?,"C\nD",')
    text = end.join(lines).replace(",", separator) + end
    source = open_source(table(tmp_path, text, "utf-8-sig"))
    assert [source.where(i).rpartition(":")[2] for i in range(len(source))] == ["2", "4"]
    one, two = source.record(0), source.record(1)
    assert (one["id"], one["image"], two["id"], two["image"]) == ("x", "a.png", "y", "b.png")
    assert (one["question"], one["answer"], two["answer"]) == ("What?", 'A"b"', "C\nD")


def test_a_field_may_hold_a_picture(tmp_path):
    packed = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(200_000)).decode()
    source = open_source(table(tmp_path, f"image,caption\n{packed},A boat.\n"))
    picture = source.media(0, source.record(0)["image"])
    assert isinstance(picture, bytes)
    assert len(picture) == 200_008
    assert csv.field_size_limit() < 200_000  # other programs keep theirs


def test_captions_are_read_as_samples(tmp_path):
    dataset = open_dataset([table(tmp_path, "id,image,caption\nx7,a.png,A boat.\n")])
    sample = dataset.sample(0)
    assert sample.id == "x7"
    assert [message.role for message in sample.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,text\na.png,A boat.\n", "has the columns image, text: expected image, question"),
        ("", "has the columns none"),
        (
            "image_path,question,answer\na.png,What?,A boat.\n",
            "has the columns image_path, question, answer and no 'image': rename image_path to",
        ),
        ("images,caption\na.png,A boat.\n", "no 'image': rename images to image, or delete it"),
        ("File,caption\na.png,A boat.\n", "no 'image': rename file to image"),
        ("image,image,answer\na.png,b.png,A\n", "has two columns 'image': rename or delete one"),
        (
            'image,answer\na.png,"A boat.\nb.png,B\n',
            r"table.csv:2: no row of a table: .*never closed",
        ),
        ('image,answer\na.png,"A" boat\n', r"table.csv:2: no row of a table: .*not doubled"),
    ],
)
def test_a_table_without_the_known_columns_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        open_source(table(tmp_path, text))


@pytest.mark.parametrize("columns", ["question,answer", "image,image_path,answer"])
def test_tables_of_text_and_tables_with_more_columns_are_read(tmp_path, columns):
    assert len(open_source(table(tmp_path, f"{columns}\n{columns}\n"))) == 1


def test_a_short_row_is_named(tmp_path):
    source = open_source(table(tmp_path, "image,question,answer\na.png,What?,A boat.\nb.png\n"))
    with pytest.raises(DataError, match=r"table.csv:3 has 1 fields, and the first line 3"):
        source.record(1)


def test_bytes_that_are_no_text(tmp_path):
    recipe = table(tmp_path, "image,answer\na.png,hôtel\n", "latin-1")
    with pytest.raises(
        DataError, match=r"table.csv:2: no UTF-8 \(byte 0xf4\): save the table as CSV"
    ):
        open_source(recipe)
