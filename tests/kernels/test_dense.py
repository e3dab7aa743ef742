"""Few rows times a plain weight equals float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lapilli.kernels.dense import dense, dense_reference, is_dense_native
from lapilli.kernels.library import Library


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    gap=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_equals_float64(
    library: Library,
    threads: int,
    rows: list[int],
    inputs: int,
    outputs: int,
    bias: bool,
    dtype: torch.dtype,
    gap: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(*rows, inputs).to(dtype)
    weight = torch.randn(outputs, inputs + gap).to(dtype)[:, :inputs]  # rows lie apart
    added = torch.randn(outputs).to(dtype) if bias else None
    wide = functional.linear(x.double(), weight.double(), None if added is None else added.double())
    assert is_dense_native(x, weight)
    found = dense(x, weight, added)
    assert found.dtype == dtype
    near = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 2**-8}
    torch.testing.assert_close(found.double(), wide, **near)
    if dtype == torch.float32:
        torch.testing.assert_close(dense_reference(x, weight, added).double(), wide, **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_formats_run_on_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 8).to(dtype), torch.randn(3, 8).to(dtype)
    assert not is_dense_native(x, weight)
    torch.testing.assert_close(dense(x, weight, None), functional.linear(x, weight))


def test_a_transposed_weight_runs_on_torch() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8, 3).T
    assert not is_dense_native(x, weight)
    torch.testing.assert_close(dense(x, weight, None), functional.linear(x, weight))


def test_the_default_dtype_of_a_program_does_not_count() -> None:
    x, weight = torch.randn(2, 64), torch.randn(300, 64)
    expected = dense(x, weight, None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = dense(x, weight, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
