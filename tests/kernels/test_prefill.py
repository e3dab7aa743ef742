"""Prefill attention equals float64, whatever lies in memory beside it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.kernels.library import Library
from lapilli.kernels.prefill import prefill_attention, prefill_reference, prefills_natively


def heads_first(batch: int, length: int, heads: int, width: int, *, joined: bool) -> torch.Tensor:
    """Random [B, heads, length, width]; joined: a view of rows that hold all heads side by side."""
    if joined:
        return torch.randn(batch, length, heads, width).transpose(1, 2)
    return torch.randn(batch, heads, length, width)


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 70),
    past=st.sampled_from((0, 1, 5, 64, 130)),
    heads=st.sampled_from(((1, 1), (2, 1), (3, 3), (8, 2), (7, 1))),
    width=st.sampled_from((16, 32, 64, 80, 112, 128)),
    window=st.sampled_from((None, 1, 20, 100)),
    alibi=st.booleans(),
    causal=st.booleans(),
    joined=st.booleans(),
    seed=st.integers(0, 99),
)
def test_native_and_reference_equal_float64(
    library: Library,
    threads: int,
    batch: int,
    queries: int,
    past: int,
    heads: tuple[int, int],
    width: int,
    window: int | None,
    alibi: bool,
    causal: bool,
    joined: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q = heads_first(batch, queries, heads[0], width, joined=joined)
    k = heads_first(batch, past + queries, heads[1], width, joined=joined)
    v = heads_first(batch, past + queries, heads[1], width, joined=not joined)
    slopes = torch.rand(heads[0]) if alibi else None
    expected = prefill_reference(
        q.double(),
        k.double(),
        v.double(),
        window=window,
        slopes=None if slopes is None else slopes.double(),
        causal=causal,
    ).float()
    options = {"window": window, "slopes": slopes, "causal": causal}
    assert prefills_natively(q, k, v)
    torch.testing.assert_close(
        prefill_attention(q, k, v, **options), expected, atol=2e-6, rtol=2e-5
    )
    plain = prefill_reference(q, k, v, **options)
    torch.testing.assert_close(plain, expected, atol=2e-6, rtol=2e-5)


def test_more_threads_than_heads_share_a_group(library: Library) -> None:
    del library
    before = torch.get_num_threads()
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, 50, 32), torch.randn(1, 1, 50, 32)
    try:
        torch.set_num_threads(4)
        found = prefill_attention(q, k, k)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, prefill_reference(q, k, k), atol=2e-6, rtol=2e-5)


def test_the_heads_of_a_result_lie_side_by_side(library: Library) -> None:
    del library
    x = torch.randn(2, 3, 20, 16)
    assert prefill_attention(x, x, x).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("width", [8, 24])
def test_other_widths_run_on_torch(width: int) -> None:
    x = torch.randn(1, 2, 5, width)
    assert not prefills_natively(x, x, x)
    torch.testing.assert_close(prefill_attention(x, x, x), prefill_reference(x, x, x))


def test_a_wanted_gradient_runs_on_torch() -> None:
    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    assert not prefills_natively(q, q, q)
    prefill_attention(q, q, q).sum().backward()
    assert q.grad is not None


def test_bfloat16_is_rounded_once(library: Library) -> None:
    del library
    torch.manual_seed(0)
    q, k, v = (heads_first(1, 40, 2, 32, joined=True).bfloat16() for _ in range(3))
    found = prefill_attention(q, k, v, causal=False)
    exact = prefill_reference(q.double(), k.double(), v.double(), causal=False)
    assert found.dtype == torch.bfloat16
    assert found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=2**-8)


def test_the_default_dtype_of_a_program_does_not_count() -> None:
    x = torch.randn(1, 2, 40, 32)
    expected = prefill_attention(x, x, x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = prefill_attention(x, x, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def root_mean_square(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("positions", [2048, 8192])
@pytest.mark.parametrize(("spread", "middle"), [(1.0, 0.0), (3.0, 0.0), (10.0, 0.0), (1.0, 1.0)])
def test_long_prompts_are_as_exact_as_torch_s_own_attention(
    library: Library, positions: int, spread: float, middle: float
) -> None:
    """Rows of a prompt with three tiled pictures: sums of thousands of values in float32.

    Args:
        library: every instruction set that this machine has.
        positions: of the keys.
        spread: of the queries: the larger, the fewer positions share the weight.
        middle: mean of the values, which makes the sum grow with every position.
    """
    torch.manual_seed(positions)
    q = spread * torch.randn(1, 1, 48, 64)
    k, v = torch.randn(1, 1, positions, 64), torch.randn(1, 1, positions, 64) + middle
    exact = prefill_reference(q.double(), k.double(), v.double())
    theirs = root_mean_square(prefill_reference(q, k, v) - exact)
    assert prefills_natively(q, k, v)
    assert root_mean_square(prefill_attention(q, k, v) - exact) < 1.5 * theirs
