"""The engine on a CUDA device: recorded steps give what other steps give there, and on a CPU."""

import dataclasses

import pytest
import torch

from lapilli.generate.engine import Engine
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.compiled import CASES
from tests.generate.engine.conftest import build
from tests.generate.engine.test_model_runner import (
    FAMILIES,
    STATIC,
    compare_steps,
    questions,
    run_compiled,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"speculate": "on"}], ids=str)
def test_recorded_steps_give_the_same_tokens(family, options, monkeypatch):
    model = build(FAMILIES[family])
    on_gpu = build(FAMILIES[family]).cuda()
    engine = Engine(on_gpu, WordTokenizer(), options=dataclasses.replace(STATIC, **options))
    # A number next to the middle of two steps of int8 may be rounded to either.
    near = 0.2 if "kv_dtype" in options else 1e-4
    passes = compare_steps(engine, monkeypatch, atol=near, rtol=1e-4)
    answers = engine.run(questions())
    assert len(passes) > len(engine._reader._steps.shapes) > 2  # most steps were replayed
    if not options:
        for answer, request in zip(answers, questions(), strict=True):
            assert_same(answer, answer_on_cpu(model, request), model, request)


def answer_on_cpu(model, request):
    return Engine(model, WordTokenizer()).run([request])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family, monkeypatch):
    model = build(FAMILIES[family]).to("cuda", torch.bfloat16)
    engine = Engine(model, WordTokenizer(), options=STATIC)
    passes = compare_steps(engine, monkeypatch, atol=0.2, rtol=0.05)
    engine.run(questions())
    assert len(passes) > 2


@pytest.mark.parametrize("case", CASES)
def test_compiled_and_recorded_steps_give_the_same_tokens(case, repository):
    run_compiled(case, "cuda", repository)
