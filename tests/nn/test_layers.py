"""Norms, activations and feed-forward blocks against their formulas; rotary positions too."""

import dataclasses
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.config.model import DecoderConfig, RopeScaling
from lapilli.errors import ConfigError
from lapilli.kernels.layer import rotate
from lapilli.nn import layers
from lapilli.nn.layers import MLP, GatedMLP, RMSNorm, Rotary, build_activation


@given(rows=st.integers(1, 4), width=st.integers(1, 33), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_equals_the_formula_in_float64(rows, width, scale):
    norm = RMSNorm(width, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(rows, width) * scale
    exact = x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x), exact.float(), atol=1e-6, rtol=1e-5)


def test_bfloat16_is_normalised_in_float32_and_scaled_in_bfloat16():
    norm = RMSNorm(16, 1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 16).bfloat16()
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), norm.weight * wide.bfloat16())


FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_its_formula(name):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(build_activation(name)(x), FORMULAS[name](x))


def test_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="'swish' is unknown: silu, gelu"):
        inspect.unwrap(build_activation)("swish")  # past the shape checks of the tests


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp_is_its_formula(bias):
    block = GatedMLP(6, 10, activation="silu", bias=bias).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    gate, up, down = (
        (part.weight, part.bias if bias else zero)
        for part in (block.gate_proj, block.up_proj, block.down_proj)
    )
    gated = x @ gate[0].T + gate[1]
    gated = gated / (1 + torch.exp(-gated)) * (x @ up[0].T + up[1])
    torch.testing.assert_close(block(x), gated @ down[0].T + down[1])
    assert len(block.state_dict()) == (6 if bias else 3)


def test_pieces_of_a_long_prompt_equal_the_whole(monkeypatch):
    block = GatedMLP(6, 10, activation="silu", bias=True).double()
    x = torch.randn(2, 23, 6, dtype=torch.float64)
    whole = block(x)
    sizes = []
    block.gate_proj.register_forward_hook(lambda _, seen, __: sizes.append(seen[0].shape[1]))
    monkeypatch.setattr(layers, "PIECE_BYTES", 7 * 10 * 8)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), whole)
    assert sizes == [6, 6, 6, 5]


def test_mlp_is_its_formula():
    block = MLP(6, 10, activation="relu").double()
    x = torch.randn(3, 6, dtype=torch.float64)
    inner = (x @ block.fc1.weight.T + block.fc1.bias).clamp(min=0)
    torch.testing.assert_close(block(x), inner @ block.fc2.weight.T + block.fc2.bias)


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
