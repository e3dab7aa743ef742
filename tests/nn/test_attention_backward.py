"""Attention that stores no scores against the formula, backwards too."""

import pytest
import torch

from lapilli.kernels.library import native
from lapilli.kernels.prefill import prefill_reference
from lapilli.nn.attention import attend
from lapilli.nn.attention_backward import FEWEST, attention_backward, has_native_backward
from lapilli.nn.onednn import has_onednn

pytestmark = pytest.mark.skipif(
    native() is None or not has_onednn(), reason="needs the library and oneDNN"
)


def draw(length, *, heads=4, kv_heads=2, width=32, rows=2, dtype=torch.float32):
    random = torch.Generator().manual_seed(length)
    sizes = (heads, kv_heads, kv_heads)
    drawn = [torch.randn(rows, length, n, width, generator=random).to(dtype) for n in sizes]
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "kv_heads"), [(5, 2), (64, 1), (130, 4)])
def test_output_and_gradients_are_those_of_the_formula(length, kv_heads, causal):
    given = draw(length, kv_heads=kv_heads)
    expected = prefill_reference(*given, scale=0.3, causal=causal)
    found = attention_backward(*given, scale=0.3, causal=causal)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, given, gradient),
        torch.autograd.grad(expected, given, gradient),
        atol=2e-5,
        rtol=1e-4,
    )


def test_bfloat16_is_computed_in_float32():
    given = draw(100, dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in given]
    gradient = torch.randn(2, 4, 100, 32).bfloat16()
    found = torch.autograd.grad(attention_backward(*given), given, gradient)
    expected = torch.autograd.grad(prefill_reference(*wide), wide, gradient.float())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, atol=2e-2, rtol=2e-2)


def test_long_rows_that_learn_take_it():
    long, short = draw(FEWEST), draw(FEWEST - 1)
    assert has_native_backward(*long)
    assert "_Attention" in attend(*long).grad_fn.name()
    assert not has_native_backward(*short)
    with torch.no_grad():
        assert not has_native_backward(*long)
