"""The adapter's product in one step of autograd against the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lapilli.lora.linear import LoraLinear, QLoraLinear, Update, lora_product
from lapilli.nn.linear import has_onednn
from lapilli.quant.nf4 import Nf4Linear


def draw(rows, inputs, outputs, rank):
    random = torch.Generator().manual_seed(rows)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rank, inputs), (outputs, rank))
    return [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]


def formula(x, weight, bias, a, b, scaling):
    return functional.linear(x, weight, bias) + scaling * (x @ a.T) @ b.T


@pytest.mark.slow
@given(*[st.integers(1, 24)] * 3, st.integers(1, 6), st.booleans())
def test_output_and_gradients_are_those_of_the_formula(rows, inputs, outputs, rank, by_onednn):
    tensors = draw(rows, inputs, outputs, rank)
    expected = formula(*tensors, 1.5)
    how = Update(1.5, 0.0, by_onednn and has_onednn())
    found = lora_product(*tensors, how=how)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, gradient),
        torch.autograd.grad(expected, tensors, gradient),
        atol=1e-3,
        rtol=1e-4,
    )


def test_dropout_is_that_of_the_mask_forwards_and_backwards():
    x, weight, bias, a, b = draw(50, 20, 10, 3)
    torch.manual_seed(3)
    found = lora_product(x, weight, bias, a, b, how=Update(2.0, 0.25, by_onednn=False))
    torch.manual_seed(3)
    keep = torch.rand_like(x) >= 0.25
    assert 0.6 < keep.float().mean() < 0.9
    dropped = x * keep / 0.75
    expected = functional.linear(x, weight, bias) + 2.0 * (dropped @ a.T) @ b.T
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, a, b], gradient),
        torch.autograd.grad(expected, [x, a, b], gradient),
        atol=1e-3,
        rtol=1e-4,
    )


def test_autocast_decides_about_the_dtype_and_gradients_keep_that_of_their_weight():
    layer = LoraLinear(nn.Linear(8, 6), rank=2, scaling=1.0)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert layer.lora_A.weight.grad.dtype == x.grad.dtype == torch.float32
    expected = formula(x, layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight, 1.0)
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("has_bias", [True, False])
def test_over_a_stored_weight_it_is_that_over_its_floats(has_bias):
    plain = nn.Linear(100, 2100, bias=has_bias)
    stored = Nf4Linear(plain.weight, plain.bias)
    floats = nn.Linear(100, 2100, bias=has_bias)
    floats.weight = nn.Parameter(stored.weight_rows(0, 2100))
    floats.bias = plain.bias
    layers = [
        QLoraLinear(stored, rank=3, scaling=0.5),
        LoraLinear(floats, rank=3, scaling=0.5),
    ]
    for half in ("lora_A", "lora_B"):
        drawn = torch.randn_like(getattr(layers[0], half).weight)
        for layer in layers:
            getattr(layer, half).weight = nn.Parameter(drawn)
    x = torch.randn(4, 100, requires_grad=True)
    results = []
    for layer in layers:
        out = layer(x)
        wanted = [x, layer.lora_A.weight, layer.lora_B.weight]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    torch.testing.assert_close(results[0], results[1], atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(layers[0].merged().weight, layers[1].merged().weight)
