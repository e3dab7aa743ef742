"""`lapilli decide`: a line for each question, JSON lines, and one error for a wrong file."""

import json
from pathlib import Path

import pytest

from lapilli.cli.decide import _line, question_of, read_questions
from lapilli.errors import PromptError
from lapilli.pipeline import Choice, Predicate, Score, load
from lapilli.pipeline.questions import (
    ChoiceAnswer,
    Level,
    Option,
    PredicateAnswer,
    Refusal,
    ScoreAnswer,
)
from lapilli.prompt.message import MediaPart

PICTURE = str(Path(__file__).parents[2] / "examples" / "picture.png")
ASKED = [
    Predicate("Is there a star?", "star"),
    Choice("What shape is the red object?", ["circle", "square", "star"], spelled=True),
    Score("How many objects are there?", [Level("0"), Level("1"), Level("2"), Level("3")]),
]
ROWS = [
    {"type": "predicate", "name": "star", "instructions": "Is there a star?"},
    {
        "type": "choice",
        "instructions": "What shape is the red object?",
        "choices": [{"value": "circle"}, "square", "star"],
        "spelled": True,
    },
    {
        "type": "score",
        "instructions": "How many objects are there?",
        "levels": [{"label": "0"}, "1", "2", {"label": "3", "description": ""}],
    },
]


@pytest.mark.slow
def test_answers_are_those_of_the_library(lapilli, tmp_path):
    """A terminal and a program are told the same, in order, of files and options together."""
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    where = ("--device", "cpu", "--dtype", "float32")
    command = ("decide", PICTURE, "--question", "Is it night?", "--questions", str(file), *where)
    done = lapilli(*command, "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    chat = load("pebble", device="cpu", dtype="float32")
    night, star, shape, count = chat.decide(MediaPart(PICTURE), [Predicate("Is it night?"), *ASKED])
    assert [row["type"] for row in rows] == ["predicate", "predicate", "choice", "score"]
    assert [row["name"] for row in rows] == [None, "star", None, None]
    assert rows[0]["question"] == "Is it night?"
    assert rows[0]["probability"] == pytest.approx(night.probability, abs=1e-5)
    assert rows[1]["probability"] == pytest.approx(star.probability, abs=1e-5)
    assert rows[2]["choice"] == shape.choice
    shares = [one["probability"] for one in rows[2]["probabilities"]]
    assert shares == pytest.approx(shape.probabilities, abs=1e-5)
    assert rows[3]["score"] == pytest.approx(count.score, abs=1e-4)

    plain = lapilli(*command, "--quiet")
    assert plain.returncode == 0, plain.stderr
    lines = [line.split("\t") for line in plain.stdout.splitlines()]
    assert [line[0] for line in lines] == [
        "Is it night?",
        "star",
        "What shape is the red object?",
        "How many objects are there?",
    ]
    assert lines[2][1] == shape.choice
    assert lines[1][2] == f"yes {star.probability:.3f}"


@pytest.mark.slow
def test_a_question_that_the_model_refuses_is_a_line_with_the_reason(lapilli):
    done = lapilli("decide", "--text", "A boat.", "--question", "Does it float?", "--json")
    assert done.returncode == 0, done.stderr
    [row] = map(json.loads, done.stdout.splitlines())
    assert row["type"] == "refusal"
    assert row["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PICTURE,), "no question: ask one with --question TEXT, or several in --questions"),
        (("--question", "Is it?"), "nothing to decide about: name a picture, or a text with"),
        ((PICTURE, "--question", " "), "with something in them"),
        ((PICTURE, "--questions", "none.json"), "none.json: No such file or directory"),
    ],
)
def test_what_cannot_be_asked_is_one_line(lapilli, arguments, message):
    done = lapilli("decide", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_is_a_list_or_has_a_question_on_each_line(tmp_path):
    as_list, as_lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    as_list.write_text(json.dumps([*ROWS, "Is it red?"], indent=1), encoding="utf-8-sig")
    lines = [json.dumps(row, ensure_ascii=False) for row in [*ROWS, "Is it \u2028 red?"]]
    as_lines.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    expected = [
        ASKED[0],
        Choice(ASKED[1].instructions, [Option("circle"), "square", "star"], spelled=True),
        Score(ASKED[2].instructions, [Level("0"), "1", "2", Level("3")]),
    ]
    assert read_questions(as_list) == [*expected, Predicate("Is it red?")]
    assert read_questions(as_lines) == [*expected, Predicate("Is it \u2028 red?")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"Is it?"\n{"type": "choice"', r"q\.json: line 2: not JSON"),
        ('["Is it?", ""]', r"q\.json: question 2: the instructions of a question must be"),
        ('["Is it?"', r"q\.json: not JSON"),
        ("[" * 100_000, r"q\.json: lists or objects too deep"),
        ('{"type": "predicate", "type": "score"}', r"line 1: not JSON.*twice"),
        ("", r"q\.json has no question"),
        ("[]", r"q\.json has no question"),
    ],
)
def test_a_wrong_file_is_named_with_the_place(tmp_path, content, message):
    file = tmp_path / "q.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(PromptError, match=message):
        read_questions(file)


def test_a_file_of_another_encoding(tmp_path):
    file = tmp_path / "q.json"
    file.write_bytes(b'"Is it \xff?"')
    with pytest.raises(PromptError, match=r"q\.json: not UTF-8 at byte 8"):
        read_questions(file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "a question must be a text, or an object whose type is predicate, choice or score"),
        ({"type": "rank", "instructions": "?"}, "whose type is predicate, choice or score"),
        ({"type": ["choice"]}, "whose type is predicate, choice or score"),
        ({"type": "score", "instruction": "?"}, "unknown key 'instruction' of a score: expected"),
        ({"instructions": "Is it?", "levels": [1, 2]}, "unknown key 'levels' of a predicate"),
        ({"type": "choice", "name": "a"}, "a choice needs choices and instructions"),
        ({"instructions": ["Is it?"]}, "instructions and name of a question must be texts"),
        ({"instructions": "Is it?", "name": 3}, "instructions and name of a question must be"),
        (ROWS[1] | {"spelled": 1}, "spelled must be true or false, got 1"),
        (ROWS[1] | {"choices": "ab"}, "choices must be a list, got 'ab'"),
        (ROWS[1] | {"choices": ["a"]}, "choices must be 2 to 255, got 1"),
        (
            ROWS[1] | {"choices": ["a", {"label": "b"}]},
            "choices are texts, true and false, or objects with value",
        ),
        (
            ROWS[1] | {"choices": ["a", {"value": 3}]},
            "choices are texts, true and false, or objects with value",
        ),
        (
            ROWS[1] | {"choices": ["a", None]},
            "choices are texts, true and false, or objects with value",
        ),
        (
            ROWS[2] | {"levels": ["a", {"label": "b", "worth": 3}]},
            "levels are texts or whole numbers, or objects with label",
        ),
        (
            ROWS[2] | {"levels": [{"label": "b", "description": 3}, "a"]},
            "levels are texts or whole numbers, or objects with label",
        ),
    ],
)
def test_a_wrong_question_says_what_is_wrong(given, message):
    with pytest.raises(PromptError, match=message):
        question_of(given)


@pytest.mark.parametrize(
    ("question", "answer", "line"),
    [
        (Predicate("Is\nit?"), PredicateAnswer(0.25), "Is it?\tno\tyes 0.250"),
        (Predicate("Is it?", "it"), PredicateAnswer(0.5, "it"), "it\tyes\tyes 0.500"),
        (
            Choice("Is it?", [True, "maybe"]),
            ChoiceAnswer(True, (0.75, 0.25), (True, "maybe")),
            "Is it?\ttrue\ttrue 0.750, maybe 0.250",
        ),
        (
            Score("How much?", [3, 5]),
            ScoreAnswer(4.5, (0.25, 0.75), ("3", "5"), (3, 5)),
            "How much?\t4.50\t3 0.250, 5 0.750",
        ),
        (
            Predicate("Is it?"),
            Refusal("It needs a picture."),
            "Is it?\trefused: It needs a picture.",
        ),
    ],
)
def test_an_answer_is_one_line(question, answer, line):
    assert _line(question, answer) == line
