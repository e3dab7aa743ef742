"""The faster products equal torch's, and stand aside where they have no business."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lapilli.nn.linear import FEW, FloatLinear
from lapilli.nn.onednn import has_onednn, onednn_linear


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    inputs=st.integers(1, 130),
    outputs=st.integers(1, 130),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_onednn_equals_float64(
    rows: list[int], inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(*rows, inputs), torch.randn(outputs, inputs)
    added = torch.randn(outputs) if bias else None
    wide = functional.linear(x.double(), weight.double(), None if added is None else added.double())
    with torch.inference_mode():
        found = onednn_linear(x, weight, added)
    torch.testing.assert_close(found, wide.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 50])
def test_the_layer_equals_the_plain_one(rows: int, by_onednn: bool) -> None:
    if by_onednn and not has_onednn():
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    plain = nn.Linear(33, 21)
    fast = FloatLinear.of(plain, by_onednn=by_onednn)
    x = torch.randn(rows, 33)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)
    assert fast.weight is plain.weight
    assert fast.bias is plain.bias


def test_gradients_and_other_formats_are_those_of_a_plain_layer() -> None:
    fast = copy.deepcopy(FloatLinear.of(nn.Linear(8, 4), by_onednn=has_onednn()))
    fast(torch.randn(20, 8)).sum().backward()
    assert fast.weight.grad is not None
    for dtype in (torch.bfloat16, torch.float64):
        fast = fast.to(dtype)
        for rows in (1, 20):
            with torch.no_grad():
                assert fast(torch.randn(rows, 8).to(dtype)).dtype == dtype
