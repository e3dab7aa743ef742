"""A program: the engine with its decode step compiled for the CPU, run by test_static.py.

Fails if the answers differ, or if a new length makes torch compile again.
"""

import dataclasses
import sys

import torch

from lapilli.generate.engine import Engine
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import CONFIG, MPT, SMALL, build, request_of

CASES = {
    "kernel": (dataclasses.replace(CONFIG, head_dim=16), {}),
    "fused": (dataclasses.replace(CONFIG, sliding_window=9), {}),
    "alibi int8": (MPT, {"kv_dtype": "int8"}),
}


def questions(count: int):
    return [request_of([1 + i, 2, 3 + i], max_new_tokens=2 + 9 * i) for i in range(1, 1 + count)]


def main(case: str) -> None:
    torch.set_num_threads(1)
    config, options = CASES[case]
    model = build(config)
    plain = Engine(model, WordTokenizer(), options=dataclasses.replace(SMALL, **options))
    engine = Engine(
        model, WordTokenizer(), options=dataclasses.replace(SMALL, compile="on", **options)
    )
    engine.run(questions(2))  # two rows, then one: everything there is to compile
    with torch.compiler.set_stance("fail_on_recompile"):
        answers = engine.run(questions(4))
    for ours, theirs, asked in zip(answers, plain.run(questions(4)), questions(4), strict=True):
        assert_same(ours, theirs, model, asked)
    rows, blocks = map(set, zip(*engine._reader._steps.shapes, strict=True))
    assert rows == {1, 2, 4}
    assert blocks == {8, 16}
    print("the same")


if __name__ == "__main__":
    main(sys.argv[1])
