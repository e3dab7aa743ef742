"""Questions of a batch that are no JSON lines: Parquet files, and folders of pictures."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from lapilli.cli.answers import AnswerFile, write_table
from lapilli.cli.batch import beside
from lapilli.cli.questions import Line, read_questions
from lapilli.errors import ConfigError, DataError, PromptError


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


def media(line, folder):
    return [part.source for part in line.question(folder).messages[-1].media]


@pytest.mark.parametrize("group", [1, 2, 5])
def test_pictures_of_a_table(tmp_path, group):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "t.parquet"
    pictures = [png(colour) for colour in ("red", "blue", "green")]
    rows = [{"bytes": one, "path": None} for one in pictures]
    rows += [{"bytes": None, "path": "a.png"}, None]
    table = pyarrow.table({"id": range(5), "question": ["q"] * 5, "image": rows})
    write_table(table, path, row_group_size=group)
    lines = read_questions(path)
    assert [json.loads(line.content)["id"] for line in lines] == [0, 1, 2, 3, 4]
    assert [media(line, tmp_path) for line in reversed(lines)] == [
        [],
        [str(tmp_path / "a.png")],
        *([one] for one in reversed(pictures)),
    ]


def test_paths_of_a_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "t.parquet"
    write_table(pyarrow.table({"question": ["q"], "path": ["a.png"]}), path)
    assert media(read_questions(path)[0], tmp_path) == [str(tmp_path / "a.png")]
    write_table(pyarrow.table({"text": ["q"]}), path)
    with pytest.raises(DataError, match=r"has the columns text: expected one named question"):
        read_questions(path)


def test_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/x.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(png("red"))
    lines = read_questions(tmp_path, "What?")
    rows = [json.loads(line.content) for line in lines]
    assert [row["id"] for row in rows] == ["a.jpg", "b/x.PNG"]
    assert media(lines[1], tmp_path) == [str(tmp_path / "b" / "x.PNG")]
    with pytest.raises(PromptError, match="say with --question what to ask"):
        read_questions(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match=r"has no picture: expected files that end in \.avif"):
        read_questions(tmp_path / "empty", "What?")
    with pytest.raises(PromptError, match="is no folder of pictures"):
        read_questions(tmp_path / "a.jpg", "What?")


def test_answers_as_a_table(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import read_table

    target = tmp_path / "out.parquet"
    (tmp_path / "in").write_text("")
    with AnswerFile(beside(target), [], source=tmp_path / "in") as answers:
        answers.add({"line": 2, "id": 7, "asked": "b", "error": "no"})
        answers.add({"line": 1, "id": "x", "asked": "a", "answer": "yes", "new_tokens": 3})
        answers.sort()
        write_table(answers, target)
        assert [row["line"] for row in answers.results()] == [1, 2]
    rows = read_table(target).to_pylist()
    assert [(row["line"], row["id"], row["answer"]) for row in rows] == [
        (1, '"x"', "yes"),
        (2, "7", None),
    ]
    beside(target).unlink()
    with pytest.raises(ConfigError, match=r"is there, and out.parquet.jsonl, where its answers"):
        beside(target)


def line_of(**row):
    return Line(1, json.dumps(row).encode())


def test_messages_are_asked_as_a_question_is():
    """A line in OpenAI's form is the one that question, system and images make."""
    url = {"url": "a.png", "detail": "high"}
    parts = [
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": "https://example.com/b.png"}},
        {"type": "text", "text": "What is it?"},
    ]
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    images = ["a.png", "https://example.com/b.png"]
    plain = line_of(question="What is it?", system="Be brief.", images=images)
    found = line_of(messages=said, id=3).question(Path("/pictures"))
    assert found.messages == plain.question(Path("/pictures")).messages
    assert [part.source for part in found.messages[-1].media] == ["/pictures/a.png", images[1]]
    assert found.head["id"] == 3


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"messages": [{"role": "user", "contnt": "a"}]}, "unknown key 'contnt'"),
        ({"messages": [{"role": "user", "content": "a"}], "image": "a.png"}, 'both "messages" and'),
        ({"messages": [{"role": "user", "content": "a"}], "item": 3}, '"messages" and "item"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "-"}]}]},
            "'-' is standard input",
        ),
        ({"mesages": []}, "unknown key 'mesages': did you mean \"messages\"?"),
        ({"qestion": "a"}, "unknown key 'qestion': did you mean \"question\"?"),
        ({"question": "a", "imges": ["b"]}, "unknown key 'imges': did you mean \"images\"?"),
        ({"question": "a", "Image": "b"}, "unknown key 'Image': did you mean \"image\"?"),
        ({"question": "a", "sytem": "b"}, "unknown key 'sytem': did you mean \"system\"?"),
    ],
)
def test_a_mistyped_key_is_named(row, error):
    found = line_of(**row).question(Path(), ["item"])
    assert found.messages == ()
    assert error in found.head["error"]


def test_other_keys_are_the_owners():
    row = {"question": "a", "question_id": 3, "image_id": 4, "answer": "b", "questions": 2}
    assert line_of(**row).question(Path()).messages


def test_messages_of_a_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    picture = {"type": "image_url", "image_url": {"url": "a.png"}}
    said = [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]
    path = tmp_path / "t.parquet"
    write_table(pyarrow.table({"id": ["x"], "messages": [said]}), path)
    [line] = read_questions(path)
    expected = line_of(question="What is it?", image="a.png").question(tmp_path)
    assert line.question(tmp_path).messages == expected.messages
