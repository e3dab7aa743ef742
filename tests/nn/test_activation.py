"""Activations against their formulas in float64."""

import inspect
import math

import pytest
import torch

from lapilli.errors import ConfigError
from lapilli.nn.activation import build_activation

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
