"""Feed-forward blocks against their formula in float64."""

import pytest
import torch

from lapilli.nn.mlp import MLP, GatedMLP


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


def test_mlp_is_its_formula():
    block = MLP(6, 10, activation="relu").double()
    x = torch.randn(3, 6, dtype=torch.float64)
    inner = (x @ block.fc1.weight.T + block.fc1.bias).clamp(min=0)
    torch.testing.assert_close(block(x), inner @ block.fc2.weight.T + block.fc2.bias)
