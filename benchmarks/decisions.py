"""Calibration of decisions: is it so as often as pebble's probabilities say?

    scenes nobody trained on -> "Is there a red circle?" about each, with the truth
    chat.decide: probability of yes -> ten bins: what was said, how often it was so

python -m benchmarks.decisions [SCENES] writes benchmarks/results/decisions.json and prints the
table of docs/guide/decide.md. It measures quality, not time.
"""

import json
import sys
from pathlib import Path

import numpy as np

import lapilli
from lapilli.pipeline.questions import Predicate, PredicateAnswer
from pebble.draw import draw
from pebble.questions import exists, has_attribute
from pebble.reference import Question
from pebble.sample import sample_scene
from pebble.score import EXAM_SEED

RESULT = Path(__file__).parent / "results" / "decisions.json"
FIRST_SEED = EXAM_SEED + 900_000_000  # behind those of every exam
QUESTIONS_PER_SCENE = 10
EDGES = np.linspace(0, 1, 11)


def ask(num_scenes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what pebble said of every question, and whether it was so."""
    chat = lapilli.load("pebble", device="cpu", dtype="float32")
    said, truth = [], []
    for number in range(num_scenes):
        scene = sample_scene(FIRST_SEED + number, "objects")
        rng = np.random.default_rng([FIRST_SEED + number, 1])
        drawn = [(exists, has_attribute)[i % 2](scene, rng) for i in range(QUESTIONS_PER_SCENE)]
        questions: list[Question] = [one for one in drawn if one is not None]
        answers = chat.decide(draw(scene), [Predicate(one.text) for one in questions])
        for question, answer in zip(questions, answers, strict=True):
            assert isinstance(answer, PredicateAnswer)
            said.append(answer.probability)
            truth.append(question.answer == "yes")
    return np.array(said), np.array(truth, dtype=float)


def bins(said: np.ndarray, truth: np.ndarray) -> list[dict[str, float]]:
    """Return per tenth of probability how many questions, what was said, how often it was so."""
    which = np.clip(np.digitize(said, EDGES) - 1, 0, len(EDGES) - 2)
    return [
        {
            "from": float(EDGES[at]),
            "to": float(EDGES[at + 1]),
            "questions": int((which == at).sum()),
            "said": float(said[which == at].mean()),
            "so": float(truth[which == at].mean()),
        }
        for at in range(len(EDGES) - 1)
        if (which == at).any()
    ]


def report(said: np.ndarray, truth: np.ndarray, num_scenes: int) -> dict[str, object]:
    """Return what was measured: the bins, and the expected calibration error over them."""
    rows = bins(said, truth)
    error = sum(row["questions"] * abs(row["said"] - row["so"]) for row in rows) / len(said)
    return {
        "scenes": num_scenes,
        "questions": len(said),
        "accuracy": float(((said > 0.5) == (truth > 0.5)).mean()),
        "expected_calibration_error": error,
        "brier": float(((said - truth) ** 2).mean()),
        "bins": rows,
    }


def table(found: dict[str, object]) -> str:
    """Return the bins as a table of the guide."""
    rows = [
        f"| {row['from']:.1f} to {row['to']:.1f} | {row['questions']} | {row['said']:.3f} | "
        f"{row['so']:.3f} |"
        for row in found["bins"]  # type: ignore[attr-defined]
    ]
    head = "| probability of yes | questions | mean of what was said | it was so |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def main(num_scenes: str = "400") -> None:
    said, truth = ask(int(num_scenes))
    found = report(said, truth, int(num_scenes))
    RESULT.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(table(found))
    for name in ("questions", "accuracy", "expected_calibration_error", "brier"):
        print(f"{name}: {found[name]:.4g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
