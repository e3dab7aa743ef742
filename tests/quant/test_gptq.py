"""GPTQ: the textbook's algorithm, on the grids of the packed formats."""

import pytest
import torch

from lapilli.errors import ConfigError
from lapilli.quant import QuantConfig
from lapilli.quant.activations import CalibrationLayer, Rounding, linear_of
from lapilli.quant.gptq import Grid, quantize_by_gptq, round_in_turn, spread_of
from lapilli.quant.quantize import nibbles_of, round_weight
from tests.quant.decoders import samples_of, small_decoder

CONFIGS = [
    QuantConfig(),
    QuantConfig(levels="zeros", group_size=32),
    QuantConfig(levels="symmetric", group_size=64),
    QuantConfig(bits=8),
]


def problem(seed: int = 0, out: int = 24, inputs: int = 96):
    """A weight, and the second moments of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(600, inputs, generator=generator) @ (torch.eye(inputs) + 2 * mix)
    return torch.randn(out, inputs, generator=generator), x.t() @ x


def grid_of(weight: torch.Tensor, config: QuantConfig, bits: int | None = None) -> Grid:
    bits = bits or config.bits
    packed = round_weight(weight, None, bits, config)
    return Grid.of(packed, (1, 255) if bits == 8 else nibbles_of(bits, config.levels))


def one_by_one(weight, gram, order, grid):
    """The algorithm without blocks: the inverse is updated after every input (OBQ's formulas)."""
    damped = gram.double().clone()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    left, inverse = weight.double().clone(), torch.linalg.inv(damped)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for column in order.tolist():
        code, value = grid.nearest(column, left[:, column].float())
        codes[:, column] = code.to(torch.uint8)
        error = (left[:, column] - value) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_codes_are_those_of_the_textbook(config: QuantConfig) -> None:
    weight, gram = problem()
    order = gram.diagonal().argsort(descending=True)
    grid = grid_of(weight, config)
    found = round_in_turn(weight, spread_of(gram, order, what="x"), order, grid)
    expected = one_by_one(weight, gram, order, grid)
    assert (found == expected).float().mean() > 0.995  # ties in another precision


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_packed_weights_are_the_values_that_were_chosen(config: QuantConfig) -> None:
    weight, gram = problem(1)
    order = torch.arange(96)
    grid = grid_of(weight, config)
    codes = round_in_turn(weight, spread_of(gram, order, what="x"), order, grid)
    packed = grid.pack(codes).dequantize()
    for column in (0, 17, 95):
        assert torch.equal(
            grid.nearest(column, packed[:, column])[0].to(torch.uint8), codes[:, column]
        )
        assert torch.allclose(grid.nearest(column, packed[:, column])[1], packed[:, column])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_products_are_closer_than_those_of_plain_rounding(config: QuantConfig) -> None:
    weight, gram = problem(2)
    order = gram.diagonal().argsort(descending=True)
    grid = grid_of(weight, config)
    codes = round_in_turn(weight, spread_of(gram, order, what="x"), order, grid)
    errors = []
    for packed in (grid.packed, grid.pack(codes)):
        missed = packed.dequantize() - weight
        errors.append(float(((missed @ gram) * missed).sum()))
    assert errors[1] < 0.7 * errors[0]


def test_without_correlations_every_weight_goes_to_the_nearest() -> None:
    weight, _ = problem(3)
    grid = grid_of(weight, QuantConfig(levels="zeros", group_size=32))
    order = torch.randperm(96)
    codes = round_in_turn(weight, spread_of(torch.eye(96), order, what="x"), order, grid)
    assert torch.equal(grid.pack(codes).data, grid.packed.data)


def test_inputs_never_seen_change_nothing() -> None:
    weight, gram = problem(4)
    gram[5] = gram[:, 5] = 0
    grid = grid_of(weight, QuantConfig(levels="zeros", group_size=32))
    order = gram.diagonal().argsort(descending=True)
    codes = round_in_turn(weight, spread_of(gram, order, what="x"), order, grid)
    nearest = grid.nearest(5, weight[:, 5])[0].to(torch.uint8)
    assert torch.equal(codes[:, 5], nearest)


def test_three_bits_use_eight_levels() -> None:
    weight, gram = problem(5)
    for levels, allowed in (("zeros", range(8)), ("symmetric", range(4, 12))):
        grid = grid_of(weight, QuantConfig(levels=levels, group_size=32), bits=3)
        order = torch.arange(96)
        codes = round_in_turn(weight, spread_of(gram, order, what="x"), order, grid)
        assert set(codes.unique().tolist()) <= set(allowed)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_moments_of_no_numbers_are_named(broken: float) -> None:
    with pytest.raises(ConfigError, match=r"layer 3, mlp\.up_proj"):
        spread_of(torch.full((8, 8), broken), torch.arange(8), what="layer 3, mlp.up_proj")


def test_moments_of_fewer_samples_than_inputs_are_damped() -> None:
    x = torch.randn(3, 64)
    spread = spread_of(x.t() @ x, torch.arange(64), what="x")
    assert bool(torch.isfinite(spread).all())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_layer_is_packed_with_its_biases(config: QuantConfig) -> None:
    decoder = small_decoder(qkv_bias=True, mlp_bias=True, num_kv_heads=2)
    calibration = CalibrationLayer(decoder, 0, samples_of(decoder), Rounding(config))
    calibration.observe(gram=True)
    before = calibration.error(calibration.rounded_to_nearest())
    bias = linear_of(calibration.layer, "self_attn.q_proj").bias.clone()
    quantize_by_gptq(calibration)
    assert calibration.error(calibration.layer) < before
    assert torch.allclose(calibration.layer.self_attn.q_proj.plain_bias, bias)
