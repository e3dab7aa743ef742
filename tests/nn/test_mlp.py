"""Activations and feed-forward blocks against their formulas."""

import inspect
import math

import pytest
import torch

from lapilli.errors import ConfigError
from lapilli.nn import mlp
from lapilli.nn.mlp import MLP, GatedMLP, build_activation

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
    monkeypatch.setattr(mlp, "PIECE_BYTES", 7 * 10 * 8)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), whole)
    assert sizes == [6, 6, 6, 5]


def test_mlp_is_its_formula():
    block = MLP(6, 10, activation="relu").double()
    x = torch.randn(3, 6, dtype=torch.float64)
    inner = (x @ block.fc1.weight.T + block.fc1.bias).clamp(min=0)
    torch.testing.assert_close(block(x), inner @ block.fc2.weight.T + block.fc2.bias)
