"""`lapilli rank`: a line per query and item, the best ones alone, and one error for a bad file."""

import json
from pathlib import Path

import pytest
import torch

import lapilli
from lapilli.cli.rank import Catalogue, ScoreOptions, lines_of
from lapilli.errors import ConfigError, StoreError
from lapilli.prompt.message import MediaPart
from lapilli.rank import Labels, YesNo
from lapilli.rank import rank as score_items
from lapilli.store import Store, StoreWriter
from lapilli.train.build import add_modalities

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


def load(source="pebble"):
    return lapilli.load(str(source), device="cpu", dtype="float32")


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


def test_a_missing_file_is_one_line(lapilli, tmp_path):
    done = lapilli("rank", str(tmp_path / "none.jsonl"), str(tmp_path / "none.jsonl"))
    assert done.returncode == 2
    assert "none.jsonl is no file: expected rows with an id and a text" in done.stderr


def test_a_store_gives_its_ids_and_vectors(tmp_path, monkeypatch):
    stored = torch.randn(600, 2, 8).half()
    with StoreWriter(tmp_path / "s", encoder="e") as writer:
        writer.add(list(range(600)), stored)
    asked = []

    def get(self, ids):
        asked.append(len(ids))
        return one_by_one(self, ids)

    one_by_one = Store.get
    monkeypatch.setattr(Store, "get", get)
    catalogue = Catalogue(tmp_path / "s")
    items = catalogue.items()
    torch.testing.assert_close(next(items), stored[0].float())
    assert asked == [256]
    assert len(list(items)) == 599
    assert catalogue.ids == [str(i) for i in range(600)]


def test_what_is_no_catalogue(tmp_path):
    with pytest.raises(StoreError, match="is no store: it has no manifest"):
        Catalogue(tmp_path)
    with StoreWriter(tmp_path / "s", encoder="e", width=4):
        pass
    with pytest.raises(StoreError, match="has no entries: there is nothing to rank"):
        Catalogue(tmp_path / "s")
    items = write_jsonl(tmp_path / "items.jsonl", ITEMS)
    with pytest.raises(ConfigError, match="--modality reads entries of a store"):
        Catalogue(items, modality="item")
    assert list(Catalogue(items).items()) == [text for _, text in ITEMS]
    assert Catalogue(items).ids == ["a", "b", 3]


@pytest.mark.slow
def test_entries_are_media_of_a_modality(lapilli, tmp_path):
    add_modalities("pebble", tmp_path / "m", {"item": {"kind": "vector", "width": 3}})
    vectors = torch.randn(4, 3)
    with StoreWriter(tmp_path / "s", encoder="e", dtype="float32") as writer:
        writer.add(list("abcd"), vectors)
    queries = write_jsonl(tmp_path / "queries.jsonl", QUERIES[:1])
    command = ("rank", str(queries), str(tmp_path / "s"), "--model", str(tmp_path / "m"))
    exact = ("--device", "cpu", "--dtype", "float32")
    done = lapilli(*command, *exact, "--modality", "item")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["item"] for row in found] == list("abcd")
    chat = load(tmp_path / "m")
    items = [MediaPart(vector, "item") for vector in vectors]
    scores = torch.tensor([row["score"] for row in found])
    torch.testing.assert_close(scores, score_items(QUERIES[0][1], items, chat), atol=1e-6, rtol=0)
    for name, says in (
        ((), "as wide as the language model, got torch.float32 [1, 3]"),
        (("--modality", "user"), "a store is given for 'user': expected a modality"),
    ):
        wrong = lapilli(*command, *exact, *name)
        assert wrong.returncode == 2
        assert says in wrong.stderr
        assert len(wrong.stderr.splitlines()) == 1


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
