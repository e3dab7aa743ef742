"""Fused operations equal their references and float64, for rows of any length and layout."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.kernels import layer
from lapilli.kernels.library import Library
from lapilli.nn.layers import RMSNorm

EVERYWHERE = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def chosen(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations under test run on the library of this round."""
    monkeypatch.setattr(layer, "native", lambda: library)


@EVERYWHERE
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 200),
    seed=st.integers(0, 9),
    offset=st.sampled_from((0.0, 1.0)),
)
def test_rms_norm(threads: int, rows: int, width: int, seed: int, offset: float) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(2, rows, width), torch.randn(width)
    expected = layer.rms_norm_reference(x.double(), weight.double(), 1e-5, offset)
    found = layer.rms_norm(x, weight, 1e-5, offset).double()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@EVERYWHERE
@given(rows=st.integers(0, 5), width=st.integers(1, 200), seed=st.integers(0, 9))
def test_silu_mul(threads: int, rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    gate, up = 8 * torch.randn(rows, width), torch.randn(rows, width)
    expected = layer.silu_mul_reference(gate.double(), up.double())
    assert torch.allclose(layer.silu_mul(gate, up).double(), expected, rtol=1e-5, atol=1e-6)


@EVERYWHERE
@given(rows=st.integers(0, 5), width=st.integers(1, 200), seed=st.integers(0, 9))
def test_gelu_mul(threads: int, rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    gate, up = 8 * torch.randn(rows, width), torch.randn(rows, width)
    expected = layer.gelu_mul_reference(gate.double(), up.double())
    assert torch.allclose(layer.gelu_mul(gate, up).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("product", "reference"),
    [(layer.silu_mul, layer.silu_mul_reference), (layer.gelu_mul, layer.gelu_mul_reference)],
)
def test_gates_at_the_ends(product, reference, threads: int) -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, float("nan"), float("inf")] * 40)
    found = product(gate, torch.ones_like(gate))
    expected = reference(gate, torch.ones_like(gate))
    same = (found - expected).abs() < 1e-6 + 1e-6 * expected.abs()
    assert (same | (found == expected) | (found.isnan() & expected.isnan())).all()


@pytest.mark.slow
@EVERYWHERE
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    length=st.integers(1, 9),
    width=st.sampled_from((16, 32, 64, 96, 128)),
    seed=st.integers(0, 9),
)
def test_rotate(threads: int, batch: int, heads: int, length: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(batch, length, heads, width).transpose(1, 2)
    cos, sin = torch.randn(2, batch, 1, length, width)
    expected = layer.rotate_reference(x.double(), cos.double(), sin.double())
    found = layer.rotate(x, cos, sin)
    assert (found.double() - expected).abs().max().item() < 2e-6
    assert found.shape == x.shape


def test_gradients_take_the_reference() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    layer.rms_norm(x, torch.ones(32), 1e-5).sum().backward()
    assert x.grad is not None


def test_other_dtypes_take_the_reference() -> None:
    x = torch.randn(3, 32).bfloat16()
    assert layer.rms_norm(x, torch.ones(32).bfloat16(), 1e-5).dtype == torch.bfloat16


def test_the_norm_module_is_the_operation() -> None:
    norm = RMSNorm(48, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 48)
    with torch.inference_mode():
        assert torch.equal(norm(x), layer.rms_norm(x, norm.weight, 1e-6))
