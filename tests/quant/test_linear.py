"""Packed layers and stored tables; on a CPU by the functions of a GPU, and on one where one is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import ConfigError
from lapilli.kernels.linear import linear_reference
from lapilli.quant import QuantConfig
from lapilli.quant import linear as gpu
from lapilli.quant.linear import (
    MOST_TILED_ROWS,
    QuantLinear,
    StoredEmbedding,
    float_weight,
    gpu_linear,
    int4_tiles,
    scales_and_zeros,
    summed8,
)
from lapilli.quant.quantize import round_weight
from tests.kernels.test_linear import KINDS, packed_weight


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_float32_unless_somebody_says_otherwise(stored):
    table = torch.randn(7, 4).to(stored)
    ids = torch.tensor([[3, 3, 0]])
    embedding = StoredEmbedding(table)
    assert torch.equal(embedding(ids), table.float()[ids])
    embedding.dtype = torch.bfloat16
    assert torch.equal(embedding(ids), table.bfloat16()[ids])
    assert embedding.weight.dtype == stored


GPU = torch.device("cuda")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def error(found: torch.Tensor, expected: torch.Tensor, typical: float = 0.0) -> float:
    """Return the largest difference, as a share of the largest output, or of a typical one."""
    largest = max(expected.abs().max().item(), typical)
    return (found.float() - expected).abs().max().item() / largest


@given(
    st.sampled_from(KINDS),
    st.integers(1, 70),
    st.sampled_from([(32, 32), (96, 32), (128, 64), (256, 128), (100, 32), (96, 64)]),
    st.sampled_from([1, 2, 5, MOST_TILED_ROWS, MOST_TILED_ROWS + 1]),
    st.sampled_from(list(DTYPES)),
    st.booleans(),
)
@settings(max_examples=40)
def test_products_equal_the_reference(kind, out_features, sizes, rows, dtype, bias):
    in_features, group = sizes
    packed = packed_weight(kind, (out_features, in_features), group=group, bias=bias)
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected = linear_reference(x.float(), packed, weight_only=True)
    # A single output may be small because its terms cancel; what was rounded away is not.
    typical = (x.float().norm(dim=-1).max() * packed.dequantize().square().mean().sqrt()).item()
    tiles = int4_tiles(packed, dtype)
    is_linear = kind in ("symmetric", "zeros")  # as the levels of torch's product are
    fits = is_linear and in_features % 32 == 0 and in_features % group == 0
    assert (tiles is not None) == fits
    for found in (gpu_linear(x, packed, tiles), gpu_linear(x, packed, None)):
        assert found.dtype == dtype
        assert error(found, expected, typical) < DTYPES[dtype]


@pytest.mark.parametrize("kind", ["symmetric", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_scales_and_zeros_say_the_same_weight(kind, group):
    packed = packed_weight(kind, (35, 256), group=group)
    found = scales_and_zeros(packed, torch.float32)
    assert found.shape == (256 // group, 48, 2)  # rows of padding too
    nibbles = gpu.unpack4(packed.data).float().view(48, -1, group)
    scales, zeros = found.transpose(0, 1)[..., None].unbind(2)
    weight = ((nibbles - 8) * scales + zeros).flatten(1)
    torch.testing.assert_close(weight[:35], packed.dequantize(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 16])
def test_products_and_sums(rows):
    packed = packed_weight("int8", (37, 100))
    x = torch.randn(rows, 100)
    expected = linear_reference(x, packed, weight_only=True)
    assert error(summed8(x, packed), expected) < 1e-5


def test_8_bits_are_whole_numbers_until_the_end():
    packed = packed_weight("int8", (37, 100))
    whole = float_weight(packed, torch.bfloat16).float()
    assert torch.equal(whole, whole.round())
    scaled = whole * packed.scales.view(-1)[:37, None]
    torch.testing.assert_close(scaled, packed.dequantize(), atol=0, rtol=0)


def test_a_gpu_without_bfloat16_makes_floats(monkeypatch):
    """What decides is asked of the device, so a pretended one will do."""
    packed = packed_weight("symmetric", (32, 128))

    class Pretended:
        device = GPU

    object.__setattr__(packed, "data", Pretended())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert int4_tiles(packed, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert int4_tiles(packed, torch.float16) is None


@pytest.mark.parametrize("kind", KINDS)
def test_layer(kind):
    packed = packed_weight(kind, (40, 128), bias=True)
    layer = QuantLinear(packed)
    x = torch.randn(2, 3, 128)
    expected = linear_reference(x.view(6, 128), packed, weight_only=True).view(2, 3, 40)
    assert error(layer.on_gpu(x), expected) < 1e-5
    kept = layer._tiles
    layer.on_gpu(x)
    assert layer._tiles is kept  # made once
    other = packed_weight(kind, (40, 128), bias=True, seed=1)
    layer.qweight, layer.scales, layer.zeros = other.data, other.scales, other.zeros
    layer.packed_bias = other.bias
    layer.span_scales = other.span_scales
    expected = linear_reference(x.view(6, 128), other, weight_only=True).view(2, 3, 40)
    assert error(layer.on_gpu(x), expected) < 1e-5  # and anew for another weight


def test_activations_of_another_format_are_multiplied_by_floats():
    packed = packed_weight("symmetric", (40, 128))
    layer = QuantLinear(packed)
    x = torch.randn(3, 128)
    expected = linear_reference(x, packed, weight_only=True)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert error(layer.on_gpu(x.to(dtype)), expected) < 2e-2
    assert layer._tiles.dtype == torch.bfloat16


def test_no_gradients():
    layer = QuantLinear(packed_weight("symmetric", (32, 128)))
    with pytest.raises(ConfigError, match="no gradients on a GPU either"):
        layer.on_gpu(torch.randn(1, 128, requires_grad=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 16, 129])
def test_on_the_device(kind, group, rows):
    packed = packed_weight(kind, (80, 256), group=group, bias=True)
    layer = QuantLinear(packed).to(GPU)
    x = torch.randn(rows, 256)
    expected = linear_reference(x.bfloat16().float(), packed, weight_only=True)
    assert error(layer(x.to(GPU, torch.bfloat16)).cpu(), expected) < DTYPES[torch.bfloat16]
    assert (layer._tiles is not None) == (kind != "int8")
    assert error(layer(x.to(GPU)).cpu(), linear_reference(x, packed, weight_only=True)) < 1e-2


@pytest.mark.gpu
@needs_gpu
def test_tiles_on_the_device_are_the_weight():
    """The identity shows every weight: a swapped pair of nibbles would be seen."""
    packed = packed_weight("zeros", (64, 128), group=32)
    on_device = QuantLinear(packed).to(GPU).packed
    tiles = int4_tiles(on_device, torch.bfloat16)
    weight = tiles.product(torch.eye(128, device=GPU, dtype=torch.bfloat16)).T
    assert error(weight.cpu(), packed.dequantize()) < DTYPES[torch.bfloat16]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_on_the_device(bits):
    weight = torch.randn(40, 128)
    config = QuantConfig(bits=bits, search=False)
    here, there = (round_weight(w, None, bits, config) for w in (weight, weight.to(GPU)))
    assert there.data.device.type == "cuda"
    near = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(there.dequantize().cpu(), here.dequantize(), **near)
