"""Data sets with one of everything that goes wrong."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lapilli.errors import DataError
from lapilli.prompt.template import TEMPLATES
from lapilli.train.data import SampleEncoder, open_dataset, to_sample
from lapilli.train.data.check import (
    DataReport,
    Finding,
    ImageChecker,
    Summary,
    check,
    rendered,
    tokenized,
)
from lapilli.train.data.encoder import plan_encoder
from lapilli.train.recipe import SourceRecipe
from tests.train.data.conftest import RECORDS, turns


def write(folder: Path, records: list[object]) -> str:
    """One record per line; line n has record n - 1."""
    path = folder / "data.jsonl"
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def look(folder: Path, records: list[object], **options: object) -> DataReport:
    return check(open_dataset([SourceRecipe(path=write(folder, records))]), **options)


def kinds(report: DataReport) -> list[tuple[str, int]]:
    return [(f.kind, int(f.where.rpartition(":")[2])) for f in report.findings]


@pytest.mark.slow
def test_nothing_is_wrong_with_good_data(folder, tokenizer, model):
    encoder = SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], model)
    report = look(folder, RECORDS, encoder=encoder, max_length=500)
    assert report.findings == ()
    assert (report.num_samples, report.num_with_media, report.num_text_only) == (3, 2, 1)
    assert (report.num_media, report.num_different_media, report.num_answers) == (3, 2, 5)
    assert report.words == Summary(min=6, median=9, p95=9, max=9, total=24)
    rows = [
        encoder.encode(open_dataset([SourceRecipe(path=str(folder / "data.json"))]).sample(i))
        for i in range(3)
    ]
    lengths = [len(row.prompt) for row in rows]
    assert report.positions is not None
    assert (report.positions.total, report.positions.max) == (sum(lengths), max(lengths))
    assert report.supervised is not None
    assert report.supervised.total == sum(sum(row.prompt.loss_mask) for row in rows)
    assert report.supervised_share == report.supervised.total / sum(lengths)
    assert "nothing is wrong" in report.to_text()


def test_everything_that_is_wrong_is_found_with_its_line(folder, tokenizer, model):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    Image.new("RGB", (30, 20), "red").save(folder / "twin.png")
    long = " ".join(["word"] * 600)
    records = [
        {"id": "a", "image": "red.png", "conversations": turns("<image>", "A")},
        {"id": "b", "image": "broken.jpg", "conversations": turns("<image>", "A")},
        {"id": "c", "image": "gone.png", "conversations": turns("<image>", "A")},
        {"id": "d", "conversations": [{"from": "robot", "value": "Q"}]},
        {"id": "e", "conversations": turns("<image>", "A")},
        {"id": "f", "image": "red.png", "conversations": turns("Q", "A")},
        {"id": "g", "conversations": turns("Q", "A", "R", "  ")},
        {"id": "h", "conversations": turns("Q", "")},
        {"id": "i", "conversations": turns("Q")},
        {"id": "j", "conversations": turns(long, "A")},
        {"id": "a", "conversations": turns("Q", "A")},
        {"id": "k", "image": "twin.png", "conversations": turns("<image>", "A")},
        {"id": "l", "image": "red.png", "conversations": turns("<image> <image>", "A")},
        {"id": "m", "conversations": [*turns("Q", "A"), turns("Q", "B")[1]]},
        '{"id": "n", "conversations"',
    ]
    encoder = SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], model)
    report = look(folder, records, encoder=encoder, max_length=500)
    assert kinds(report) == [
        ("image", 2),
        ("image", 3),
        ("record", 4),
        ("record", 5),
        ("record", 6),
        ("empty answer", 7),
        ("empty answer", 8),
        ("no labels", 8),
        ("no labels", 9),
        ("no labels", 9),
        ("too long", 10),
        ("duplicate id", 11),
        ("duplicate image", 12),
        ("mended", 13),
        ("turns", 14),
        ("record", 15),
    ]
    text = report.to_text()
    path = folder / "data.jsonl"
    for expected in (
        "13 errors",
        "3 notes",
        f"{path}:2 (id 'b'): {folder / 'broken.jpg'} is damaged",
        f"{path}:3 (id 'c'): {folder / 'gone.png'} does not exist",
        ": pictures are looked for beside the data file, or in the folder that",
        f"{path}:4 (id 'd'): turn 0 is from 'robot'",
        f"{path}:7 (id 'g'): empty answer (number 2)",
        "more than 500: 0 of ",
        f"{path}:11 (id 'a'): {path}:1 has the same id",
        f"{path}:12 (id 'k'): {folder / 'twin.png'} is the same as {folder / 'red.png'}",
        f"{path}:14 (id 'm'): message 2 is from assistant, expected user",
        f"{path}:15: no valid JSON",
    ):
        assert expected in text
    assert json.loads(json.dumps(report.to_dict()))["num_errors"] == 13


def test_turns_are_checked_without_a_model_too(folder):
    twice = [*turns("Q", "A"), turns("Q", "B")[1]]
    records = [{"conversations": twice}, {"conversations": turns("Q", "A", "R")}]
    report = look(folder, records, template=TEMPLATES["vicuna_v1"])
    assert kinds(report) == [("turns", 1), ("mended", 2)]
    assert "message 2 is from assistant, expected user" in report.findings[0].text
    assert [finding.is_error for finding in report.findings] == [True, False]
    assert kinds(look(folder, records)) == [("mended", 2)]


def test_a_finding_is_one_line_of_printable_letters():
    text = str(Finding("image", "a.json:1", "\x1b[2J", "b\n\x1b[31m\ud800é.png does not exist"))
    expected = r"a.json:1 (id '\x1b[2J'): b\n\x1b[31m\ud800é.png does not exist"
    assert text == expected
    text.encode()


def test_long_lists_are_shortened(folder):
    report = look(folder, [{"conversations": turns("Q", "")}] * 30)
    assert len(report.errors) == 30
    assert report.to_text(limit=7).count("empty answer (number 1)") == 7
    assert "... and 23 more of the kind 'empty answer'" in report.to_text(limit=7)


def test_every_picture_is_opened_once(folder, monkeypatch):
    from lapilli.train.data import check as module

    opened = []
    fetch = module.fetch_picture
    monkeypatch.setattr(
        module, "fetch_picture", lambda source: opened.append(source) or fetch(source)
    )
    records = [{"image": "red.png", "conversations": turns("<image>", "A")}] * 5
    records += [{"image": "gone.png", "conversations": turns("<image>", "A")}] * 3
    report = look(folder, records)
    assert len(opened) == 2
    assert [finding.kind for finding in report.findings] == ["image"] * 3


def test_progress_counts_samples(folder):
    seen = []
    look(folder, RECORDS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_positions_are_those_of_the_checkpoint(folder):
    planned = plan_encoder("pebble")
    report = look(folder, RECORDS[:1], encoder=planned.encoder, max_length=planned.context_length)
    assert planned.template.name == "vicuna_v1"
    assert report.positions is not None
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    assert report.positions.max == len(planned.encoder.encode(dataset.sample(0)).prompt)
    assert plan_encoder("pebble", template="plain").template.name == "plain"


def test_a_line_of_a_report_is_short_whatever_a_sample_is_called():
    line = str(Finding("record", "\0" * 900, "x" * 9000, "is none"))
    assert "\0" not in line
    assert len(line) < 1100


def test_the_summary_of_nothing_is_none():
    assert Summary.of([]) is None
    assert Summary.of(range(1, 101)) == Summary(min=1, median=50, p95=95, max=100, total=5050)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data.tar", "data.parquet"])
def test_other_files_are_checked_too(folder, name):
    from tests.train.data.test_source import write as write_file

    report = check(open_dataset([SourceRecipe(path=str(write_file(folder / name, RECORDS[1:2])))]))
    assert report.findings == ()


EMPTY = "its 'image' is empty: it is learned without a picture"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "image,question,answer\nred.png,Q,A\n,Q,A\n"),
        ("a.tsv", "image\tcaption\nred.png\tA\n\tA\n"),
        ("a.jsonl", '{"image": "red.png", "caption": "A"}\n{"image": null, "caption": "A"}\n'),
        ("a.jsonl", '{"image": "red.png", "caption": "A"}\n{"image": "", "caption": "A"}\n'),
        ("a.json", '[{"image": "red.png", "caption": "A"},\n{"image": "", "caption": "A"}]'),
    ],
)
def test_a_row_whose_picture_is_empty_is_noted(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    report = check(open_dataset([SourceRecipe(path=str(path))]))
    assert [finding.text for finding in report.notes] == [EMPTY]
    assert kinds(report)[0][1] == (3 if name in ("a.csv", "a.tsv") else 2)
    assert (report.errors, report.num_text_only) == ((), 1)


def test_a_row_whose_picture_is_empty_is_noted_in_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for first, second in (("red.png", None), ((folder / "red.png").read_bytes(), None)):
        table = pyarrow.table({"image": [first, second], "caption": ["A", "B"]})
        parquet.write_table(table, folder / "a.parquet")
        report = check(open_dataset([SourceRecipe(path=str(folder / "a.parquet"))]))
        assert [(one.text, one.where[-2:]) for one in report.findings] == [(EMPTY, ":2")]


def test_what_says_that_it_has_no_pictures_is_fine(folder):
    records = [
        {"conversations": turns("Q", "A")},
        {"images": [], "conversations": turns("Q", "A")},
        {"image": None, "images": ["red.png"], "conversations": turns("<image>", "A")},
    ]
    assert look(folder, records).findings == ()


def test_rendered_spans_are_the_turns_of_the_template(folder):
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    spans = rendered(dataset.sample(2), TEMPLATES["vicuna_v1"])
    assert [s.text for s in spans if s.supervised] == [" The first.</s>", " Blue.</s>"]
    assert [s.text for s in spans if s.is_media] == ["<image>", "<image>"]


def test_tokenized_spans_are_the_tokens_of_the_model(folder, tokenizer, model):
    dataset = open_dataset([SourceRecipe(path=str(folder / "data.json"))])
    encoder = SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], model)
    spans = tokenized(dataset.sample(0), encoder, ImageChecker())
    assert [s.text for s in spans if s.is_media] == ["<image: 4 positions>"]
    learned = [s.text for s in spans if s.supervised]
    assert learned == [" A red square.</s>", " Yes.</s>"]
    assert spans[0].text.startswith("<s>")


def test_a_sample_that_cannot_be_shown_is_named(tmp_path, tokenizer, model):
    encoder = SampleEncoder(tokenizer, TEMPLATES["vicuna_v1"], model)
    lost = to_sample(
        {"id": "x", "image": str(tmp_path / "gone.png"), "conversations": turns("<image>", "A")},
        where="d.json:1",
    )
    with pytest.raises(DataError, match=r"d.json:1 \(id 'x'\): .*gone.png does not exist"):
        tokenized(lost, encoder, ImageChecker())
    twice = to_sample({"id": "y", "messages": [{"role": "user", "content": "Q"}] * 2}, where="w")
    with pytest.raises(DataError, match=r"w \(id 'y'\): message 1 is from user"):
        rendered(twice, TEMPLATES["vicuna_v1"])
