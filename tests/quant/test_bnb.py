"""bitsandbytes: which layers it reads, and that it reads and rounds as we do."""

import pytest
import torch
from torch import nn

from lapilli.lora.linear import LoraStored
from lapilli.quant import bnb
from lapilli.quant.nf4 import Nf4Linear, to_floats


@pytest.fixture
def functional():
    return pytest.importorskip("bitsandbytes").functional


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def test_it_reads_on_a_gpu_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(bnb, "_is_installed", lambda: True)
    assert bnb.reads_on(torch.device("cuda", 1))
    assert not bnb.reads_on(torch.device("cpu"))
    monkeypatch.setattr(bnb, "_is_installed", lambda: False)
    assert not bnb.reads_on(torch.device("cuda"))


@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_are_rounded_as_there(functional, double_quant):
    weight = drawn(96, 192)
    layer = Nf4Linear(weight, None, double_quant=double_quant)
    numbers, state = functional.quantize_4bit(
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
    expected = functional.dequantize_4bit(numbers, state)
    torch.testing.assert_close(layer.weight_rows(0, 96), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [192, 70])
def test_it_reads_what_we_stored(functional, dtype, inputs):
    layer = Nf4Linear(drawn(40, inputs), None)
    for start, stop in ((0, 40), (16, 33)):
        stored = layer.qweight[start:stop], layer.scales.rows(start, stop)
        assert torch.equal(bnb.to_floats(*stored, dtype=dtype), to_floats(*stored, dtype=dtype))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_step_of_an_adapter_is_the_same_either_way(functional, monkeypatch, double_quant):
    layer = LoraStored(
        Nf4Linear(drawn(1100, 70), drawn(1100), double_quant=double_quant), rank=3, scaling=0.5
    )
    nn.init.normal_(layer.lora_B.weight)
    x = drawn(2, 5, 70).requires_grad_()
    wanted = [x, layer.lora_A.weight, layer.lora_B.weight]
    results = []
    for is_theirs in (True, False):
        monkeypatch.setattr(bnb, "reads_on", lambda device, answer=is_theirs: answer)
        assert layer.base.by_bitsandbytes is is_theirs
        assert layer.base.rows_at_once == (1100 if is_theirs else 1024)
        out = layer(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-5)


def test_the_product_and_its_gradient_are_those_of_its_own_layer(functional):
    """Against matmul_4bit, which its Linear4bit calls."""
    library = pytest.importorskip("bitsandbytes")
    weight, bias = drawn(96, 192), drawn(96)
    layer = Nf4Linear(weight, bias)
    numbers, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    x = drawn(4, 3, 192).requires_grad_()
    found, expected = layer(x), library.matmul_4bit(x, numbers.t(), state, bias=bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    slopes = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
def test_a_gpu_gives_the_numbers_of_the_cpu(functional):
    layer = Nf4Linear(drawn(1100, 192), drawn(1100), double_quant=True)
    x = drawn(7, 192)
    expected = layer(x)
    moved = layer.cuda()
    assert moved.by_bitsandbytes
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)
