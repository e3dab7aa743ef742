"""oneDNN's product equals torch's, and stands aside where it has no business."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lapilli.nn.linear import FEWEST_ROWS, OneDnnLinear, has_onednn, onednn_linear

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    inputs=st.integers(1, 130),
    outputs=st.integers(1, 130),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_float64(rows: list[int], inputs: int, outputs: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(*rows[-2:], inputs), torch.randn(outputs, inputs)
    added = torch.randn(outputs) if bias else None
    wide = functional.linear(x.double(), weight.double(), None if added is None else added.double())
    with torch.inference_mode():
        found = onednn_linear(x, weight, added)
    torch.testing.assert_close(found, wide.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, FEWEST_ROWS - 1, FEWEST_ROWS, 3 * FEWEST_ROWS])
def test_the_layer_equals_the_plain_one(rows: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(33, 21)
    fast = OneDnnLinear.of(plain)
    x = torch.randn(rows, 33)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)
    assert fast.weight is plain.weight
    assert fast.bias is plain.bias


def test_gradients_and_copies_are_those_of_a_plain_layer() -> None:
    fast = copy.deepcopy(OneDnnLinear.of(nn.Linear(8, 4)))
    fast(torch.randn(2 * FEWEST_ROWS, 8)).sum().backward()
    assert fast.weight.grad is not None
    fast = fast.bfloat16()
    with torch.no_grad():
        assert fast(torch.randn(2 * FEWEST_ROWS, 8).bfloat16()).dtype == torch.bfloat16
