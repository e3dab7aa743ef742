"""The files that one question executes: how they are counted, and how many they may be."""

import lapilli
from benchmarks.footprint import watch


def test_a_question_executes_few_files() -> None:
    chat, load, _ = watch(lambda: lapilli.load("pebble", device="cpu"))
    answer, ask, imported = watch(lambda: chat.ask("Hello?", max_new_tokens=1))
    assert answer
    assert {"pipeline/chat.py", "checkpoint/load.py", "prompt/choose.py"} <= load
    assert {"pipeline/chat.py", "pipeline/backend.py", "prompt/encode.py"} <= ask
    assert "checkpoint/load.py" not in ask
    assert "modality/image/pixels.py" not in ask, "the question has no picture"
    assert imported == set(), "everything that an answer needs is imported with the model"
    assert len(load) <= 80
    assert len(ask) <= 60
