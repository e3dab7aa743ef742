"""The files that one question executes: how they are counted, and how many they may be."""

import numpy as np

import lapilli
from benchmarks.footprint import watch


def test_a_question_executes_few_files() -> None:
    chat, load, _ = watch(lambda: lapilli.load("pebble", device="cpu"))
    picture = np.zeros((60, 60, 3), dtype=np.uint8)
    answer, ask, imported = watch(lambda: chat.ask("What is this?", picture, max_new_tokens=2))
    assert answer
    assert {"pipeline/chat.py", "checkpoint/load.py", "prompt/choose.py"} <= load
    assert {"pipeline/backend.py", "modality/image/pixels.py", "lm/decoder.py"} <= ask
    assert "checkpoint/load.py" not in ask
    assert "generate/beam.py" not in ask
    assert imported == set(), "everything that an answer needs is imported with the model"
    assert len(load) <= 80
    assert len(ask) <= 43
