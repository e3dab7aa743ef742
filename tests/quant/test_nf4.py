"""4-bit normal floats: their values, scales in a byte, gradients, and bitsandbytes as oracle."""

from functools import partial
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lapilli.lora import QLoraLinear
from lapilli.quant import nf4
from lapilli.quant.linear import QuantLinear
from lapilli.quant.nf4 import (
    VALUES,
    ExactScales,
    Nf4Linear,
    RoundedScales,
    dynamic_values,
    store_nf4,
    to_floats,
)
from lapilli.quant.quantize import QuantConfig, round4, round8


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
    "zeros": lambda w, b: QuantLinear(round4(w, b, QuantConfig(levels="zeros", group_size=32))),
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


def drawn_scales(rows, blocks):
    random = torch.Generator().manual_seed(1000 * rows + blocks)
    return torch.randn(rows, blocks, generator=random).abs() + 0.1


def test_the_values_of_a_byte():
    values = dynamic_values()
    assert len(values.unique()) == 256
    assert values.max() == 1
    assert values.min() == -(1 - 0.9 / 128)
    found = values.abs()
    decades = [((found > 10.0**-at) & (found < 10.0 ** (1 - at))).sum() for at in range(1, 8)]
    assert decades == [128, 64, 32, 16, 8, 4, 2]


@given(st.integers(1, 40), st.integers(1, 30))
def test_every_scale_becomes_the_nearest_value_of_its_block(rows, blocks):
    scales = drawn_scales(rows, blocks)
    rounded = RoundedScales(scales)
    line, found = scales.flatten(), rounded.rows(0, rows).flatten()
    mean = line.mean()
    for start in range(0, len(line), 256):
        block = line[start : start + 256] - mean
        choices = dynamic_values() * block.abs().max()
        nearest = (choices - block[:, None]).abs().amin(1)
        moved = (found[start : start + 256] - mean - block).abs()
        torch.testing.assert_close(moved, nearest, atol=1e-6, rtol=1e-4)
    half = rows // 2
    parts = [rounded.rows(0, half), rounded.rows(half, rows)]
    assert torch.equal(torch.cat(parts), rounded.rows(0, rows))
    assert torch.equal(ExactScales(scales).rows(half, rows), scales[half:])


def test_equal_scales_stay_what_they_are():
    scales = torch.full((3, 5), 0.25)
    assert torch.equal(RoundedScales(scales).rows(0, 3), scales)


@pytest.fixture
def oracle():
    return pytest.importorskip("bitsandbytes").functional


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def test_it_reads_on_a_gpu_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(nf4, "_is_installed", lambda: True)
    assert nf4.uses_bitsandbytes(torch.device("cuda", 1))
    assert not nf4.uses_bitsandbytes(torch.device("cpu"))
    monkeypatch.setattr(nf4, "_is_installed", lambda: False)
    assert not nf4.uses_bitsandbytes(torch.device("cuda"))


@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_are_rounded_as_there(oracle, double_quant):
    weight = drawn(96, 192)
    layer = Nf4Linear(weight, None, double_quant=double_quant)
    numbers, state = oracle.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    assert torch.equal(layer.qweight.flatten(), numbers.flatten())
    if double_quant:
        assert torch.equal(layer.scales.codes.flatten(), state.absmax)
        torch.testing.assert_close(layer.scales.values, state.state2.code, atol=0, rtol=1e-6)
        torch.testing.assert_close(layer.scales.largest, state.state2.absmax)
        torch.testing.assert_close(layer.scales.mean, state.offset)
    else:
        assert torch.equal(layer.scales.rows(0, 96).flatten(), state.absmax)
    expected = oracle.dequantize_4bit(numbers, state)
    torch.testing.assert_close(layer.weight_rows(0, 96), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [192, 70])
def test_it_reads_what_we_stored(oracle, dtype, inputs):
    layer = Nf4Linear(drawn(40, inputs), None)
    for start, stop in ((0, 40), (16, 33)):
        stored = layer.qweight[start:stop], layer.scales.rows(start, stop)
        assert torch.equal(
            nf4.bitsandbytes_floats(*stored, dtype=dtype), to_floats(*stored, dtype=dtype)
        )


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_step_of_an_adapter_is_the_same_either_way(oracle, monkeypatch, double_quant):
    layer = QLoraLinear(
        Nf4Linear(drawn(1100, 70), drawn(1100), double_quant=double_quant), rank=3, scaling=0.5
    )
    nn.init.normal_(layer.lora_B.weight)
    x = drawn(2, 5, 70).requires_grad_()
    wanted = [x, layer.lora_A.weight, layer.lora_B.weight]
    results = []
    for is_theirs in (True, False):
        monkeypatch.setattr(nf4, "uses_bitsandbytes", lambda device, answer=is_theirs: answer)
        assert layer.base.by_bitsandbytes is is_theirs
        assert layer.base.rows_at_once == (1100 if is_theirs else 1024)
        out = layer(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-5)


def test_the_product_and_its_gradient_are_those_of_its_own_layer(oracle):
    """Against matmul_4bit, which its Linear4bit calls."""
    library = pytest.importorskip("bitsandbytes")
    weight, bias = drawn(96, 192), drawn(96)
    layer = Nf4Linear(weight, bias)
    numbers, state = oracle.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    x = drawn(4, 3, 192).requires_grad_()
    found, expected = layer(x), library.matmul_4bit(x, numbers.t(), state, bias=bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    slopes = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
def test_a_gpu_gives_the_numbers_of_the_cpu(oracle):
    layer = Nf4Linear(drawn(1100, 192), drawn(1100), double_quant=True)
    x = drawn(7, 192)
    expected = layer(x)
    moved = layer.cuda()
    assert moved.by_bitsandbytes
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)
