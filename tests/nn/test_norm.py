"""RMSNorm against float64, and its order of roundings."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.nn.norm import RMSNorm


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
