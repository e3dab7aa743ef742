"""Rotary positions against complex numbers in float64."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.config.model import DecoderConfig, RopeScaling
from lapilli.nn.rotary import Rotary, rotate

CONFIG = DecoderConfig(
    vocab_size=5,
    hidden_size=16,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=100.0,
    max_positions=32,
)


def _turned(x: torch.Tensor, position: int, frequencies: list[float]) -> torch.Tensor:
    """Pairs (i, i + A/2) of one head as complex numbers, turned in float64."""
    x = x.double()
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:])
    angles = torch.tensor([position * f for f in frequencies], dtype=torch.float64)
    pairs = pairs * torch.polar(torch.ones(half, dtype=torch.float64), angles)
    return torch.cat((pairs.real, pairs.imag)).float()


def _plain(theta: float = 100.0) -> list[float]:
    return [theta ** (-i / 8) for i in range(0, 8, 2)]


@given(position=st.integers(0, 31), seed=st.integers(0, 999))
def test_rotation_is_complex_multiplication(position, seed):
    x = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    table = Rotary(CONFIG).table(torch.tensor([[position]]), torch.float32)
    found = rotate(x.view(1, 1, 1, 8), *table).flatten()
    torch.testing.assert_close(found, _turned(x, position, _plain()), atol=2e-5, rtol=1e-5)


def test_linear_scaling_divides_positions():
    scaled = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    cos, _ = Rotary(scaled).table(torch.tensor([[20]]), torch.float32)
    expected, _ = Rotary(CONFIG).table(torch.tensor([[5]]), torch.float32)
    torch.testing.assert_close(cos, expected)


def test_llama3_scaling_keeps_fast_and_divides_slow_frequencies():
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_positions=40)
    rotary = Rotary(dataclasses.replace(CONFIG, rope_scaling=scaling))
    x = torch.randn(8)
    expected = []
    for frequency in _plain():
        turns = 40 * frequency / (2 * math.pi)
        keep = min(max((turns - 1.0) / 3.0, 0.0), 1.0)
        expected.append(keep * frequency + (1 - keep) * frequency / 8.0)
    assert expected[0] == _plain()[0]
    assert expected[-1] == _plain()[-1] / 8.0
    found = rotate(x.view(1, 1, 1, 8), *rotary.table(torch.tensor([[30]]), torch.float32))
    torch.testing.assert_close(found.flatten(), _turned(x, 30, expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [10, 32, 50])
def test_dynamic_scaling_stretches_theta_by_the_length_of_the_row(length):
    scaling = RopeScaling(kind="dynamic", factor=2.0)
    rotary = Rotary(dataclasses.replace(CONFIG, rope_scaling=scaling))
    ratio = 2.0 * max(length, 32) / 32 - 1.0
    frequencies = _plain(100.0 * ratio ** (8 / 6))
    x = torch.randn(8)
    positions = torch.stack((torch.arange(60), torch.arange(60).clamp(max=length - 1)))
    table = [part[1:, :, 7:8] for part in rotary.table(positions, torch.float32)]
    found = rotate(x.view(1, 1, 1, 8), *table)
    torch.testing.assert_close(found.flatten(), _turned(x, 7, frequencies), atol=2e-5, rtol=1e-5)


def test_table_of_a_meta_build_is_real():
    with torch.device("meta"):
        rotary = Rotary(CONFIG)
    found = rotary.table(torch.tensor([[3]]), torch.float32)
    assert torch.equal(found[0], Rotary(CONFIG).table(torch.tensor([[3]]), torch.float32)[0])


def test_angles_are_float32_even_when_the_default_dtype_is_not():
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, _ = Rotary(CONFIG).table(torch.tensor([[31]]), torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, Rotary(CONFIG).table(torch.tensor([[31]]), torch.float32)[0])
