"""Rounding: how far packed weights may be from the ones they stand for."""

import pytest
import torch

from lapilli.errors import ConfigError
from lapilli.quant import QuantConfig
from lapilli.quant.quantize import round_weight
from lapilli.quant.rounding import round4, round8


def weights(rows: int = 40, inputs: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def test_int8_is_within_half_a_step() -> None:
    weight = weights()
    back = round8(weight, None).dequantize()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((back - weight).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_within_half_a_step(group: int, symmetric: bool) -> None:
    weight = weights()
    config = QuantConfig(group_size=group, symmetric=symmetric, search=False)
    back = round4(weight, None, config).dequantize()
    for begin in range(0, weight.shape[1], group):
        old, new = weight[:, begin : begin + group], back[:, begin : begin + group]
        if symmetric:  # the largest weight of the other sign may be a whole step away
            step = old.abs().amax(dim=1, keepdim=True) / 8
            assert bool(((new - old).abs() <= step * 1.01).all())
        else:
            span = old.amax(1, keepdim=True).clamp(min=0) - old.amin(1, keepdim=True).clamp(max=0)
            assert bool(((new - old).abs() <= span / 15 * 1.01).all())


def test_the_search_lowers_the_error() -> None:
    weight = weights(64, 512)
    error = [
        float(
            (round4(weight, None, QuantConfig(search=search)).dequantize() - weight).square().mean()
        )
        for search in (False, True)
    ]
    assert error[1] < 0.97 * error[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_constants_are_kept(symmetric: bool) -> None:
    weight = torch.zeros(16, 96)
    weight[1] = 0.25
    weight[2] = -0.25
    back = round4(weight, None, QuantConfig(group_size=32, symmetric=symmetric)).dequantize()
    assert torch.equal(back[0], torch.zeros(96))
    assert torch.allclose(back[1:3], weight[1:3], rtol=1e-3)


def test_a_bias_is_kept() -> None:
    bias = torch.randn(40)
    assert torch.equal(round8(weights(), bias).plain_bias, bias)
    assert torch.equal(
        round4(weights(), bias.half(), QuantConfig()).plain_bias, bias.half().float()
    )


def test_too_large_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights above 65504 x 8 do not fit into 4 bits"):
        round4(torch.full((16, 32), 1e6), None, QuantConfig())


def test_int8_is_packed_where_the_weight_is() -> None:
    weight = torch.empty(20, 96, device="meta")
    packed = round8(weight, weight[:, 0])
    assert {part.device.type for part in (packed.data, packed.scales, packed.bias)} == {"meta"}


@pytest.mark.parametrize("bits", [4, 8])
def test_the_default_dtype_of_a_program_does_not_count(bits: int) -> None:
    weight = torch.randn(48, 64)
    expected = round_weight(weight, None, bits, QuantConfig(bits=bits))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = round_weight(weight, None, bits, QuantConfig(bits=bits))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.scales.dtype == expected.scales.dtype
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.data, expected.data)
