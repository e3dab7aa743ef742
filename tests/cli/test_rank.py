"""`lapilli rank`: a line per query and item, the best ones alone, and one error for a bad file."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import lapilli
from lapilli.cli.rank import Catalogue, ScoreOptions, lines_of, read_texts
from lapilli.errors import ConfigError, PromptError
from lapilli.rank import Labels, YesNo
from lapilli.rank import rank as score_items

QUERIES = [("q1", "something that floats"), ("q2", "tools")]
ITEMS = [("a", "a boat"), ("b", "a hammer"), (3, "a red square")]


def write_jsonl(path: Path, rows) -> Path:
    lines = [json.dumps({"id": one, "text": text, "price": 3}) for one, text in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_scores_are_those_of_the_library(lapilli, tmp_path):
    queries = write_jsonl(tmp_path / "queries.jsonl", QUERIES)
    items = write_jsonl(tmp_path / "items.jsonl", ITEMS)
    command = ("rank", str(queries), str(items), "--device", "cpu", "--dtype", "float32")
    done = lapilli(*command)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["query"], row["item"]) for row in found] == [
        (query, item) for query, _ in QUERIES for item, _ in ITEMS
    ]
    chat = load()
    expected = [score_items(text, [t for _, t in ITEMS], chat) for _, text in QUERIES]
    scores = torch.tensor([row["score"] for row in found])
    torch.testing.assert_close(scores, torch.cat(expected), atol=1e-6, rtol=0)

    best = lapilli(*command, "--top-k", "2", "--difference", "--prompt", "{query}? {item}")
    assert best.returncode == 0, best.stderr
    rows = [json.loads(line) for line in best.stdout.splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 1, 2]
    assert rows[0]["score"] >= rows[1]["score"]

    wrong = lapilli(*command, "--labels", "yes,no way,never", "--values", "1,0,0")
    assert wrong.returncode == 2
    assert "the label 'no way' has" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def load():
    return lapilli.load("pebble", device="cpu", dtype="float32")


def test_the_best_ones_come_first_and_tied_ones_in_order():
    found = list(lines_of("q", ["a", "b", "c", "d"], [0.5, 0.9, 0.5, 0.1], 3))
    assert [(row["rank"], row["item"]) for row in found] == [(1, "b"), (2, "a"), (3, "c")]
    assert len(list(lines_of("q", ["a"], [0.5], 9))) == 1


def test_lines_come_while_scores_are_computed():
    def scores():
        yield 0.5
        raise AssertionError("nobody asked for the second")

    lines = lines_of("q", ["a", "b"], scores(), None)
    assert next(lines) == {"query": "q", "item": "a", "score": 0.5}


def test_every_kind_of_file_has_the_same_rows(tmp_path):
    rows = [("a", 'one, "two"\nthree'), ("b", "é漢")]
    write_jsonl(tmp_path / "x.jsonl", rows)
    quoted = 'id,text,more\na,"one, ""two""\nthree",1\nb,é漢,2\n'
    (tmp_path / "x.csv").write_text("\ufeff" + quoted, encoding="utf-8")
    (tmp_path / "x.tsv").write_text(
        'text\tid\n"one, ""two""\nthree"\ta\né漢\tb\n', encoding="utf-8"
    )
    ids, texts = zip(*rows, strict=True)
    parquet.write_table(pa.table({"text": texts, "id": ids}), tmp_path / "x.parquet")
    for ending in ("jsonl", "csv", "tsv", "parquet"):
        assert read_texts(tmp_path / f"x.{ending}") == rows, ending


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.txt", "a", r"expected a file that ends in .jsonl, .csv, .tsv, .parquet"),
        ("x.jsonl", "", "is empty: expected rows with id and text"),
        ("x.csv", "id,text\n", "is empty"),
        ("x.jsonl", '{"id": 1, "text": "a"}\n{', r"x.jsonl:2 is no JSON"),
        ("x.jsonl", "[1]", r"x.jsonl:1 is no JSON object"),
        ("x.jsonl", '{"text": "a"}', r'x.jsonl:1: "id" must be a text or a number, found None'),
        ("x.jsonl", '{"id": true, "text": "a"}', r'"id" must be a text or a number, found True'),
        ("x.jsonl", '{"id": 1, "text": " "}', r'"text" must be a text'),
        ("x.jsonl", '{"id": 1, "text": 5}', r'"text" must be a text, found 5'),
        ("x.csv", "id,title\n1,a\n", "has the columns id, title: expected text among them"),
        ("x.csv", "id,text\n1\n", r'x.csv:2: "text" must be a text, found None'),
        ("x.csv", 'id,text\n1,"a\n', "is no table of CSV"),
        ("x.parquet", "PAR1", "is no Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, text):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PromptError, match=text):
        read_texts(tmp_path / name)


def test_a_missing_file_is_one_line(lapilli, tmp_path):
    done = lapilli("rank", str(tmp_path / "none.jsonl"), str(tmp_path / "none.jsonl"))
    assert done.returncode == 2
    assert "none.jsonl: No such file" in done.stderr


def test_a_store_gives_its_ids_and_vectors(tmp_path, monkeypatch):
    stored = torch.randn(600, 2, 8).half()
    asked = []

    def get(ids):
        asked.append(len(ids))
        return stored[[int(one) for one in ids]]

    room = ModuleType("lapilli.store")
    opened = SimpleNamespace(ids=lambda: [str(i) for i in range(600)], get=get)
    room.Store = SimpleNamespace(open=lambda path: opened)
    monkeypatch.setitem(sys.modules, "lapilli.store", room)
    catalogue = Catalogue(tmp_path)
    items = catalogue.items()
    torch.testing.assert_close(next(items), stored[0].float())
    assert asked == [256]
    assert len(list(items)) == 599
    assert len(catalogue.ids) == 600


def test_a_folder_without_the_room_of_stores_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lapilli.store", None)
    with pytest.raises(ConfigError, match="is a folder, and this lapilli reads no stores"):
        Catalogue(tmp_path)


def test_options_say_what_a_score_is():
    assert ScoreOptions().score() == YesNo()
    assert ScoreOptions(labels="Ja, Nein", difference=True).score() == YesNo(
        yes="Ja", no="Nein", difference=True
    )
    assert ScoreOptions(labels="1,2,3").score() == Labels(("1", "2", "3"))
    assert ScoreOptions(labels="a,b", values="3,1").score() == Labels(("a", "b"), (3.0, 1.0))
    with pytest.raises(ConfigError, match="--values must be numbers, got 'x,1'"):
        ScoreOptions(labels="a,b", values="x,1").score()
    with pytest.raises(ConfigError, match="--difference takes two labels"):
        ScoreOptions(labels="1,2,3", difference=True).score()
