"""The faster products equal torch's, with gradients too, and stand aside where they must."""

import copy
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lapilli.nn.linear import (
    FEW,
    FloatLinear,
    KeptLinear,
    has_onednn,
    linear_rows,
    linear_with_backward,
    onednn_linear,
    rounded,
    times_transposed,
)


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


needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
SIZES = st.integers(1, 40)


@needs_onednn
@pytest.mark.slow
@given(SIZES, SIZES, SIZES, st.booleans(), st.sampled_from(["all", "x", "weight"]))
def test_output_and_gradients_are_those_of_torch(rows, inputs, outputs, has_bias, learns):
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, inputs, generator=random)
    weight = torch.randn(outputs, inputs, generator=random)
    bias = torch.randn(outputs, generator=random) if has_bias else None
    wanted = {"all": [x, weight, bias], "x": [x], "weight": [weight]}[learns]
    wanted = [tensor.requires_grad_() for tensor in wanted if tensor is not None]
    expected, found = functional.linear(x, weight, bias), linear_with_backward(x, weight, bias)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, gradient),
        torch.autograd.grad(expected, wanted, gradient),
        atol=1e-4,
        rtol=1e-4,
    )


@needs_onednn
def test_a_transposed_side_may_be_a_view():
    x, y = torch.randn(7, 5), torch.randn(5, 9)
    torch.testing.assert_close(times_transposed(x, y.t()), x @ y)
    torch.testing.assert_close(
        times_transposed(x.bfloat16(), y.t().bfloat16()), (x.bfloat16() @ y.bfloat16())
    )


@needs_onednn
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_weight_with_gaps_takes_no_reference(is_transposed, capfd):
    """oneDNN's plain loops took 300 times as long: attention of float32 learned by them."""
    x, wide = torch.randn(64, 64), torch.randn(64, 256)
    weight = wide[:, :64].t() if is_transposed else wide[:, :64]
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        found = onednn_linear(x, weight, None)
    ctypes.CDLL(None).fflush(None)
    ways = [line for line in capfd.readouterr().out.splitlines() if "inner_product" in line]
    assert ways
    assert not any("ref:any" in line for line in ways)
    torch.testing.assert_close(found, x @ weight.t(), atol=1e-4, rtol=1e-4)


@needs_onednn
@pytest.mark.slow
@given(st.integers(1, 2_000))
def test_sizes_are_few_and_near(length):
    found = rounded(length)
    assert length <= found <= length * 17 / 16
    assert rounded(found) == found
    assert len({rounded(n) for n in range(length, 2 * length)}) <= 17


@needs_onednn
def test_short_rows_and_powers_of_two_are_sizes():
    sizes = [*range(32), *(2**n for n in range(5, 20))]
    assert [rounded(size) for size in sizes] == sizes


@needs_onednn
def test_float_layers_learn_by_it_outside_of_autocast():
    layer = FloatLinear.of(torch.nn.Linear(6, 4), by_onednn=True)
    x = torch.randn(3, 6)
    assert "_Product" in layer(x).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


class Doubled(torch.nn.Linear):
    """A layer of somebody else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "float", "kept", "other", "hooked", "replaced"])
def test_rows_are_those_of_all_outputs(kind, bias):
    torch.manual_seed(0)
    plain = nn.Linear(8, 20, bias=bias)
    layer = {
        "float": lambda: FloatLinear.of(plain, by_onednn=False),
        "kept": lambda: KeptLinear.of(plain.bfloat16()),
        "other": lambda: Doubled(8, 20, bias=bias),
    }.get(kind, lambda: plain)()
    if kind == "hooked":
        layer.register_forward_hook(lambda _module, _given, out: out + 1)
    if kind == "replaced":
        layer.forward = lambda x: functional.linear(x, plain.weight) - 5
    x, rows = torch.randn(2, 3, 8), torch.tensor([19, 0, 7])
    with torch.no_grad():
        found, expected = linear_rows(x, layer, rows), layer(x)[..., rows]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
