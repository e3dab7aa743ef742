"""Projectors have the names and the numbers of the original."""

import pytest
import torch
from torch import nn

from lapilli.config.model import ProjectorConfig
from lapilli.errors import ConfigError
from lapilli.modality.projector import build_projector


def _config(**changes) -> ProjectorConfig:
    return ProjectorConfig(**{"kind": "mlp", "vision_size": 6, "hidden_size": 4, **changes})


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (_config(kind="linear"), ["weight", "bias"]),
        (_config(depth=1), ["0.weight", "0.bias"]),
        (_config(depth=2), ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (_config(depth=3, bias=False), ["0.weight", "2.weight", "4.weight"]),
        (_config(kind="identity", hidden_size=6), []),
    ],
)
def test_parameter_names(config, names):
    assert list(build_projector(config).state_dict()) == names


def test_mlp_uses_the_exact_gelu():
    projector = build_projector(_config(depth=2)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    first, second = projector[0], projector[2]
    inner = x @ first.weight.T + first.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(projector(x), inner @ second.weight.T + second.bias)


def test_mlp_follows_the_activation_of_its_configuration():
    assert isinstance(build_projector(_config(depth=2, activation="relu"))[1], nn.ReLU)


def test_identity_returns_its_input():
    x = torch.randn(2, 6)
    assert build_projector(_config(kind="identity", hidden_size=6))(x) is x


def test_identity_between_widths_is_refused():
    with pytest.raises(ConfigError, match="features of width 6 into 4"):
        build_projector(_config(kind="identity"))
