"""Retrieval: the layouts of BEIR, TREC and SMART."""

import json
from pathlib import Path

import pytest

from lapilli.datasets.retrieval import (
    Document,
    read_beir,
    read_smart,
    read_trec_judgements,
    read_trec_run,
    write_trec_run,
)
from lapilli.errors import DataError

SMART = (
    ".I 1\n.T\nthin wings\n.A\nsomebody\n.W\nthin wings\n  bend .\n.I 2\n.T\nheat\n.W\nflows .\n"
)


def beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    texts = [{"_id": "d1", "title": "Wings", "text": "bend"}, {"_id": "d2", "text": "heat"}]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    query = json.dumps({"_id": "q1", "text": "what bends?"})
    (folder / "queries.jsonl").write_text(query + "\n\n", encoding="utf-8")
    heading = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(heading + "q1\td1\t2\n", encoding="utf-8")
    return folder


def test_beir(tmp_path: Path) -> None:
    found = read_beir(beir(tmp_path / "b"))
    assert found.documents == {"d1": Document("Wings", "bend"), "d2": Document("", "heat")}
    assert found.documents["d1"].whole == "Wings\nbend"
    assert found.queries == {"q1": "what bends?"}
    assert found.judgements == {"q1": {"d1": 2.0}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("corpus.jsonl", "{", "corpus.jsonl:1: no JSON"),
        ("corpus.jsonl", "[1]", "expected an object"),
        ("corpus.jsonl", '{"id": "d", "text": "x"}', 'no "_id": found the keys id, text'),
        ("queries.jsonl", '{"_id": "q", "text": 3}', 'its "text" is 3'),
        ("qrels/test.tsv", "q1\td1\t2\nq1\td1\n", "test.tsv:2: expected query, document and grade"),
    ],
)
def test_damaged_beir_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = beir(tmp_path / "b")
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_beir(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dev.tsv: no such file"):
        read_beir(beir(tmp_path / "b"), split="dev")


def test_trec_judgements_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "qrels"
    path.write_text("q1 0 d1 2\nq1 0 d2 0\n", encoding="utf-8")
    assert read_trec_judgements(path) == {"q1": {"d1": 2.0, "d2": 0.0}}
    run = tmp_path / "run"
    write_trec_run(run, {"q1": {"d1": 0.5, "d2": 1.5, "d3": 0.5}}, "mine")
    assert read_trec_run(run) == {"q1": [("d2", 1.5), ("d3", 0.5), ("d1", 0.5)]}
    assert run.read_text(encoding="utf-8").splitlines()[0] == "q1 Q0 d2 1 1.5 mine"


def test_lines_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("q1 d1 2\n", encoding="utf-8")
    with pytest.raises(DataError, match="f:1: expected query, 0, document and grade"):
        read_trec_judgements(path)
    with pytest.raises(DataError, match="f:1: expected query, Q0"):
        read_trec_run(path)
    with pytest.raises(DataError, match="it has white space"):
        write_trec_run(path, {"q 1": {"d": 1.0}}, "mine")


def test_smart(tmp_path: Path) -> None:
    texts, asked, judged = (tmp_path / name for name in ("docs", "qry", "rel"))
    texts.write_text(SMART, encoding="utf-8")
    asked.write_text(".I 001\n.W\nwhat\nbends ?\n.I 004\n.W\nheat ?\n", encoding="utf-8")
    judged.write_text("1 1 1\n1 2 -1\n2 2 4 \n", encoding="utf-8")
    found = read_smart(texts, asked, judged)
    assert found.documents["1"] == Document("thin wings", "thin wings bend .")
    assert found.documents["1"].whole == "thin wings bend ."
    assert found.queries == {"1": "what bends ?", "2": "heat ?"}
    assert found.judgements == {"1": {"1": 4.0}, "2": {"2": 1.0}}
    texts.write_text("thin wings\n" + SMART, encoding="utf-8")
    with pytest.raises(DataError, match=r"docs:1: expected \.I"):
        read_smart(texts, asked, judged)
