"""4-bit normal floats: their values, rounding to the nearest, and gradients of packed layers."""

from functools import partial
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lapilli.quant.config import QuantConfig
from lapilli.quant.linear import QuantLinear
from lapilli.quant.nf4 import VALUES, Nf4Linear, store_nf4
from lapilli.quant.rounding import round4, round8


def test_the_values_are_the_papers_quantiles():
    """Appendix E: 8 quantiles above zero, 7 below, the outermost at 1 - (1/30 + 1/32) / 2."""
    outermost, normal = 1 - (1 / 30 + 1 / 32) / 2, NormalDist()
    above = [normal.inv_cdf(0.5 + (outermost - 0.5) * i / 8) for i in range(1, 9)]
    below = [-normal.inv_cdf(0.5 + (outermost - 0.5) * i / 7) for i in range(1, 8)]
    expected = sorted([*below, 0.0, *above])
    largest = max(expected)
    assert pytest.approx([value / largest for value in expected], abs=2e-4) == VALUES


@given(st.integers(1, 40), st.integers(1, 150))
def test_every_weight_becomes_the_nearest_value_of_its_block(outputs, inputs):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
    layer = Nf4Linear(weight, None)
    assert layer.qweight.dtype == torch.uint8
    found = layer.weight_rows(0, outputs)
    for start in range(0, inputs, 64):
        block = weight[:, start : start + 64]
        largest = block.abs().amax(1, keepdim=True)
        choices = largest[..., None] * torch.tensor(VALUES)
        nearest = (choices - block[..., None]).abs().amin(-1)
        moved = (found[:, start : start + 64] - block).abs()
        torch.testing.assert_close(moved, nearest, atol=1e-6, rtol=1e-5)


def test_zeros_stay_zeros():
    assert not Nf4Linear(torch.zeros(3, 70), None).weight_rows(0, 3).any()


def test_a_model_keeps_its_layers_names_and_loses_their_weights():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    store_nf4(model, ["a"])
    assert [name for name, _ in model.named_parameters()] == ["b.weight", "b.bias"]
    stored = model["a"]
    assert sum(buffer.nbytes for buffer in stored.buffers()) == 64 * 64 * 4.5 / 8 + 64 * 4  # bias


@pytest.mark.parametrize("inputs", [512, 70])
def test_scales_in_a_byte_move_little_and_weigh_less(inputs):
    weight = torch.randn(512, inputs, generator=torch.Generator().manual_seed(1))
    once, twice = (Nf4Linear(weight, None, double_quant=double) for double in (False, True))
    assert torch.equal(once.qweight, twice.qweight)
    values = [layer.weight_rows(0, 512) for layer in (once, twice)]
    moved = (values[0] - values[1]).abs().max()
    assert 0 < moved < 0.02 * weight.abs().max()
    if inputs == 512:
        bits = 8 * sum(buffer.nbytes for buffer in twice.buffers()) / weight.numel()
        assert bits == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=0.04)  # and a table of 1 KiB


PACKED = {
    "int8": lambda w, b: QuantLinear(round8(w, b)),
    "int4": lambda w, b: QuantLinear(round4(w, b, QuantConfig())),
    "zeros": lambda w, b: QuantLinear(round4(w, b, QuantConfig(symmetric=False, group_size=32))),
    "nf4": Nf4Linear,
    "nf4, scales in a byte": partial(Nf4Linear, double_quant=True),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_input_is_that_of_the_layer_made_floats(kind, dtype):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(1100, 96, generator=random) * 0.1
    layer = PACKED[kind](weight, torch.randn(1100, generator=random))
    floats = layer.weight_rows(0, 1100).to(dtype)
    if isinstance(layer, QuantLinear):
        torch.testing.assert_close(floats, layer.packed.dequantize().to(dtype))
    x = torch.randn(2, 3, 96, generator=random).to(dtype).requires_grad_()
    expected = functional.linear(x, floats, layer.plain_bias.to(dtype))
    found = layer(x)
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    )
    torch.testing.assert_close(found, expected, **tolerance)
    gradient = torch.randn(2, 3, 1100, generator=random).to(dtype)
    (one,) = torch.autograd.grad(found, x, gradient)
    (other,) = torch.autograd.grad(expected, x, gradient)
    tolerance = (
        {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.05}
    )
    torch.testing.assert_close(one, other, **tolerance)
