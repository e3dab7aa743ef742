"""Decode steps in fixed shapes give the logits of other steps, replayed or not."""

import dataclasses
import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from lapilli.errors import GenerationError
from lapilli.generate.engine import Engine, EngineOptions, model_runner
from lapilli.generate.engine.model_runner import StaticSteps, compile_modes, doublings, run_varlen
from lapilli.lora import LoraConfig, inject, merge
from lapilli.nn.paged import BlockStore, QuantizedBlockStore
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.compiled import CASES
from tests.generate.engine.conftest import CONFIG, MPT, SMALL, alone, build, picture, request_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# No guesses where nothing else is said: which ones are made depends on the clock.
STATIC = dataclasses.replace(SMALL, compile="static", speculate="off")
WIDE = dataclasses.replace(CONFIG, head_dim=16)  # read by the compiled decode attention
FAMILIES = {
    "grouped": CONFIG,
    "wide": WIDE,
    "window": dataclasses.replace(CONFIG, sliding_window=5),
    "alibi": MPT,
}


def recorded(step):
    """As a CUDA graph: what `step` does with the tensors of now is done again, without Python."""
    graph = make_fx(lambda: step())()
    return lambda: graph()


@pytest.fixture
def only_torch(monkeypatch):
    """As where nothing was compiled: torch records no foreign library."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lapilli.kernels.") and hasattr(module, "native"):
            monkeypatch.setattr(module, "native", lambda: None)
    for kind in (BlockStore, QuantizedBlockStore):
        monkeypatch.setattr(kind, "has_kernel", False)


def with_recorder(engine: Engine, recorder) -> StaticSteps:
    """Let an engine replay its steps; a recorder is used for one model only."""

    def new_recorder():
        assert engine._runner._steps.shapes == ()
        return recorder

    steps = StaticSteps(
        engine.model.language_model,
        engine.pool.store,
        most_rows=engine.options.max_rows,
        most_blocks=-(-engine.context_length // engine.pool.block_size),
        new_recorder=new_recorder,
    )
    engine._runner._steps = steps
    return steps


def compare_steps(engine: Engine, monkeypatch, **near: float) -> list[tuple[int, bool]]:
    """Run every step in fixed shapes as a ragged one too; rows of each, and if it was new."""
    steps, ragged, passes = engine._runner._steps, engine._runner.execute_model, []

    def compared(scheduled, **options):
        if not steps.supports(scheduled):
            return ragged(scheduled, **options)
        ours = steps.run(scheduled).clone()
        passes.append((len(ours), steps.is_fresh))
        theirs = run_varlen(engine.model, engine.pool.store, scheduled)
        torch.testing.assert_close(ours, theirs, **near)
        return ours

    monkeypatch.setattr(engine._runner, "execute_model", compared)
    return passes


def questions():
    """Answers that begin, grow over several blocks and end at different times."""
    return [
        request_of([i + 1, picture(i, 2 + 3 * i), 3, 4], max_new_tokens=3 + 4 * i) for i in range(6)
    ]


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 14)), min_size=1, max_size=7))
@settings(max_examples=10)
def test_every_answer_is_that_of_a_solo_run(model, drawn):
    requests = [
        request_of([5 + i, *range(1, 1 + n)], max_new_tokens=m) for i, (n, m) in enumerate(drawn)
    ]
    engine = Engine(model, WordTokenizer(), options=STATIC)
    for ours, request in zip(engine.run(requests), requests, strict=True):
        assert_same(ours, alone(model, request), model, request)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"speculate": "on"}], ids=str)
def test_static_steps_have_the_logits_of_run_varlen(family, options, monkeypatch):
    engine = Engine(
        build(FAMILIES[family]), WordTokenizer(), options=dataclasses.replace(STATIC, **options)
    )
    passes = compare_steps(engine, monkeypatch, atol=1e-5, rtol=1e-5)
    steps = engine._runner._steps
    engine.run(questions())
    assert {rows for rows, _ in passes} >= {2, 3, 4}  # a row of padding among them
    assert {blocks for _, blocks in steps.shapes} == {8, 16}
    assert sum(is_fresh for _, is_fresh in passes) == len(steps.shapes) < len(passes)


@pytest.mark.slow
@pytest.mark.usefixtures("only_torch")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("grouped", {}),
        ("grouped", {"kv_dtype": "int8"}),
        ("window", {"speculate": "on"}),
        ("alibi", {}),
    ],
    ids=str,
)
def test_a_replayed_step_gives_the_same_logits(family, options):
    model = build(FAMILIES[family])
    plain, static_engine = (
        Engine(model, WordTokenizer(), options=dataclasses.replace(SMALL, **options))
        for _ in range(2)
    )
    steps = with_recorder(static_engine, recorded)
    expected = plain.run(questions())
    for ours, theirs, request in zip(
        static_engine.run(questions()), expected, questions(), strict=True
    ):
        assert_same(ours, theirs, model, request)
    assert len(steps.shapes) > 2


@pytest.mark.slow
@pytest.mark.usefixtures("only_torch")
def test_changed_weights_are_recorded_anew():
    model = build()
    engine = Engine(model, WordTokenizer(), options=SMALL)
    steps = with_recorder(engine, recorded)
    asked = request_of([1, 2, 3], max_new_tokens=6)
    engine.run([asked])
    before = steps.shapes
    source = torch.Generator().manual_seed(0)
    config = LoraConfig(rank=2, alpha=4, targets=("language_model.*.{q,v,down}_proj",))
    for change in (lambda: inject(model, config), lambda: merge(model)):
        change()
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                with torch.no_grad():
                    parameter.normal_(std=0.3, generator=source)
        assert_same(engine.run([asked])[0], alone(model, asked), model, asked)
    assert steps.shapes == before  # those of the models before are gone


def test_only_decode_steps_have_fixed_shapes(model, tokenizer):
    engine = Engine(model, tokenizer, options=STATIC)
    handle = engine.submit(request_of([1, 2, 3], max_new_tokens=9))
    engine.step()
    assert engine._runner.is_steady
    assert engine._runner._steps.shapes == ()
    engine.step()
    assert not engine._runner.is_steady  # recorded, which is no measure for guesses
    assert engine._runner._steps.shapes == ((1, 8),)
    engine.step()
    assert engine._runner.is_steady
    handle.cancel()


def broken(step):
    raise RuntimeError("no such graphs\nand much more")


@pytest.mark.slow
def test_auto_falls_back_to_the_next_mode(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model_runner, "compile_modes", lambda *_: ("on", "static", "off"))
    tried, real = [], model_runner.static_steps

    def steps(way, *arguments, **limits):
        tried.append(way)
        made = real("off" if way == "off" else "static", *arguments, **limits)
        if made is not None:
            made._new_recorder = lambda: broken
        return made

    monkeypatch.setattr(model_runner, "static_steps", steps)
    engine = Engine(model, tokenizer, options=SMALL)
    asked = request_of([1, 2, 3])
    with (
        pytest.warns(UserWarning, match=r"goes on with 'static': no such graphs$"),
        pytest.warns(UserWarning, match=r"goes on with 'off': no such graphs$"),
    ):
        [answer] = engine.run([asked])
    assert tried == ["on", "static", "off"]
    assert_same(answer, alone(model, asked), model, asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run([asked])


def test_an_explicit_mode_that_fails_raises(model, tokenizer):
    engine = Engine(model, tokenizer, options=STATIC)
    with_recorder(engine, broken)
    with pytest.raises(GenerationError, match="the model failed: no such graphs"):
        engine.run([request_of([1, 2, 3])])
    assert engine.pool.available == engine.pool.capacity


def test_compile_modes(monkeypatch):
    assert compile_modes("auto", CPU) == ("off",)
    assert compile_modes("on", CPU) == ("on",)
    assert compile_modes("static", GPU) == ("static",)
    for has_triton, expected in ((True, ("on", "static", "off")), (False, ("static", "off"))):
        monkeypatch.setattr(
            model_runner.importlib.util, "find_spec", lambda _, found=has_triton: found or None
        )
        assert compile_modes("auto", GPU) == expected


def test_an_unknown_compile_mode_is_refused():
    with pytest.raises(GenerationError, match="compile must be 'auto', 'on', 'static' or 'off'"):
        EngineOptions(compile="graphs")


@given(st.integers(1, 9), st.integers(1, 300))
def test_sizes_waste_less_than_half(first, last):
    sizes = doublings(first, last)
    assert sizes[-1] >= last
    assert sizes[-1] < 2 * last or len(sizes) == 1
    assert all(b == 2 * a for a, b in itertools.pairwise(sizes))


def run_compiled(case: str, device: str, repository) -> None:
    """In a process of its own: torch cannot compile through the shape checks of the tests."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.generate.engine.compiled", case, device],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "the same"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_steps_give_the_same_tokens(case, repository):
    run_compiled(case, "cpu", repository)
