"""A program: the engine with its decode step compiled, run by test_model_runner.py and test_gpu.py.

    python -m tests.generate.engine.compiled CASE cpu|cuda

Fails if the answers are not those of the CPU's ordinary step, or if a new length makes torch
compile again.
"""

import copy
import dataclasses
import sys

import torch
from torch import nn

from lapilli.generate.engine import Engine
from lapilli.model import VisionLanguageModel
from lapilli.quant import QuantConfig, quantize
from lapilli.quant.linear import QuantLinear
from tests.generate.conftest import WordTokenizer
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import CONFIG, MPT, SMALL, build, request_of

FLOAT_INPUTS = QuantConfig(bits=4, group_size=32, mode="weight_only")


class AsOnGpu(nn.Module):
    """A packed layer that computes with torch alone."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer.on_gpu(x)


def kernels() -> VisionLanguageModel:
    """Attention and linear layers are ops of the compiled library."""
    model = build(dataclasses.replace(CONFIG, head_dim=16, num_layers=1))
    quantize(model, FLOAT_INPUTS)
    return model


def as_on_a_gpu() -> VisionLanguageModel:
    """Attention is fused by the compiler, linear layers are torch's."""
    model = build(dataclasses.replace(CONFIG, sliding_window=9, num_layers=1))
    quantize(model, FLOAT_INPUTS)
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(path, AsOnGpu(module))
    return model


def alibi() -> VisionLanguageModel:
    return build(dataclasses.replace(MPT, num_layers=1))


CASES = {
    "kernels": (kernels, {}),
    "as on a gpu": (as_on_a_gpu, {}),
    "alibi": (alibi, {"kv_dtype": "int8"}),
}


def questions(count: int):
    return [request_of([1 + i, 2, 3 + i], max_new_tokens=2 + 9 * i) for i in range(1, 1 + count)]


def main(case: str, device: str) -> None:
    torch.set_num_threads(1)
    make, options = CASES[case]
    model = make()
    plain = Engine(model, WordTokenizer(), options=dataclasses.replace(SMALL, **options))
    engine = Engine(
        copy.deepcopy(model).to(device),
        WordTokenizer(),
        # No guesses: which ones are made depends on the clock, and so would the shapes.
        options=dataclasses.replace(SMALL, compile="on", speculate="off", **options),
    )
    engine.run(questions(2))  # two rows, then one: everything there is to compile
    with torch.compiler.set_stance("fail_on_recompile"):
        answers = engine.run(questions(4))
    for ours, theirs, asked in zip(answers, plain.run(questions(4)), questions(4), strict=True):
        assert_same(ours, theirs, model, asked)
    rows, blocks = map(set, zip(*engine._runner._steps.shapes, strict=True))
    assert rows == {1, 2, 4}
    assert blocks == {8, 16}
    print("the same")


if __name__ == "__main__":
    main(*sys.argv[1:])
