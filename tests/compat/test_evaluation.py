"""The benchmark programs of the original, as their command lines are published."""

import base64
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lapilli.compat.__main__ import main
from lapilli.compat.evaluation import get_chunk
from tests.compat.conftest import MakeCheckpoint

SHORT = "Answer with the option's letter from the given choices directly."


@pytest.fixture
def ask(
    make_checkpoint: MakeCheckpoint,
    loaded: Any,
    tmp_path: Path,
    picture: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Module, text of the questions, options -> lines of the answers."""
    from lapilli.compat import evaluation

    generate = loaded[1].generate
    monkeypatch.setattr(loaded[1], "generate", lambda **o: generate(**(o | {"max_new_tokens": 3})))
    monkeypatch.setattr(evaluation, "load_pretrained_model", lambda *_, **__: loaded)
    monkeypatch.setattr(sys, "argv", sys.argv)
    picture.save(tmp_path / "a.png")

    def run(module: str, questions: str, *options: str) -> list[dict[str, Any]]:
        (tmp_path / "questions").write_text(questions, encoding="utf-8")
        answers = tmp_path / "out" / "answers.jsonl"
        monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns about a second copy
        main(
            [
                *("-m", module, "--model-path", "liuhaotian/llava-v1.5-7b"),
                *("--question-file", str(tmp_path / "questions")),
                *("--image-folder", str(tmp_path), "--answers-file", str(answers)),
                *("--temperature", "0", "--conv-mode", "vicuna_v1", *options),
            ]
        )
        return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]

    return run


@pytest.mark.parametrize("module", ["llava.eval.model_vqa", "llava.eval.model_vqa_loader"])
def test_questions_of_lines(ask: Any, module: str) -> None:
    lines = [{"question_id": i, "image": "a.png", "text": f"What is {i}?"} for i in range(3)]
    found = ask(module, "\n".join(map(json.dumps, lines)), "--num-chunks", "2", "--chunk-idx", "0")
    assert [one["question_id"] for one in found] == [0, 1]
    assert found[1]["prompt"] == "What is 1?"
    assert found[0]["model_id"] == "llava-v1.5-7b"
    assert found[0]["text"]


def test_science_has_questions_without_a_picture(ask: Any) -> None:
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}]
    records = [{"id": "1", "image": "a.png", "conversations": turns}]
    records.append({"id": "2", "conversations": turns})
    found = ask("llava.eval.model_vqa_science", json.dumps(records), "--single-pred-prompt")
    assert found[0]["prompt"] == f"<image>\nWhich?\nA. x\nB. y\n{SHORT}"
    assert found[1]["prompt"] == f"Which?\nA. x\nB. y\n{SHORT}"


def test_mmbench_turns_its_options(ask: Any, picture: Image.Image) -> None:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    table = "index\tquestion\thint\tA\tB\tC\tD\timage\n7\tWhich?\tLook.\tone\ttwo\t\t\t"
    table += base64.b64encode(file.getvalue()).decode() + "\n"
    found = ask("llava.eval.model_vqa_mmbench", table, "--all-rounds", "--single-pred-prompt")
    assert [one["question_id"] for one in found] == [7, 7]
    assert [one["round_id"] for one in found] == [0, 1]
    assert found[0]["prompt"] == "Look.\nWhich?\nA. one\nB. two"
    assert (found[1]["options"], found[1]["option_char"]) == (["two", "one"], ["B", "A"])
    assert csv.field_size_limit() < 200_000  # the rest of the program keeps its limit


def test_chunks() -> None:
    assert [get_chunk(range(5), 2, k) for k in (0, 1)] == [range(3), range(3, 5)]
