"""Attention of new positions and of prompts equals float64; positions land in their places."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.errors import ShapeMismatchError
from lapilli.kernels.attention import (
    attention_native,
    attention_reference,
    decode_attention,
    prefill_attention,
    prefill_reference,
    prefills_natively,
    store_positions,
    store_reference,
)
from lapilli.kernels.library import Library
from lapilli.nn.attention import attend_plain


def caches(blocks: int, heads: int, size: int, width: int, kind: str) -> dict[str, torch.Tensor]:
    """Keys and values in one format, with NaN in block 0, which no table names."""
    shape = (blocks, heads, size, width)
    keys, values = torch.randn(shape), torch.randn(shape)
    if kind == "int8":
        found = {}
        for name, cache in (("key", keys), ("value", values)):
            scales = cache.abs().amax(-1) / 127
            found[f"{name}_scales"] = scales
            found[f"{name}s"] = (cache / scales[..., None]).round().to(torch.int8)
        found["key_scales"][0] = found["value_scales"][0] = float("nan")
        return found
    keys[0] = values[0] = float("nan")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    return {"keys": keys.to(dtype), "values": values.to(dtype)}


def ragged(lengths: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A table of shuffled blocks, block 0 left out and used as padding; lengths; blocks in all."""
    used = [-(-length // size) for length in lengths]
    order = (torch.randperm(sum(used)) + 1).tolist()
    rows = []
    for count in used:
        rows.append(order[:count] + [0] * (max(used) - count))
        order = order[count:]
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(lengths).int(), sum(used) + 1


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    size=st.sampled_from((1, 7, 16, 32, 100)),
    heads=st.sampled_from(((1, 1), (2, 1), (3, 3), (8, 2), (10, 2), (32, 4))),
    width=st.sampled_from((16, 32, 64, 80, 96, 128)),
    kind=st.sampled_from(("float32", "bfloat16", "int8")),
    window=st.sampled_from((None, 1, 20)),
    alibi=st.booleans(),
    seed=st.integers(0, 99),
)
def test_native_and_reference_equal_float64(
    library: Library,
    threads: int,
    lengths: list[int],
    size: int,
    heads: tuple[int, int],
    width: int,
    kind: str,
    window: int | None,
    alibi: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    table, counts, blocks = ragged(lengths, size)
    cache = caches(blocks, heads[1], size, width, kind)
    q = torch.randn(len(lengths), heads[0], width)
    slopes = torch.rand(heads[0]) if alibi else None
    options = {"window": window, "slopes": slopes, **cache}
    keys, values = options.pop("keys"), options.pop("values")
    wide = {
        name: option.double() if isinstance(option, torch.Tensor) else option
        for name, option in options.items()
    }
    expected = attention_reference(q.double(), keys, values, table, counts, **wide)
    assert torch.isfinite(expected).all()
    found = attention_native(library, q, keys, values, table, counts, **options)
    plain = attention_reference(q, keys, values, table, counts, **options)
    assert (found.double() - expected).abs().max().item() < 1e-5
    assert (plain.double() - expected).abs().max().item() < 1e-5


def test_reference_is_plain_attention_on_a_contiguous_cache() -> None:
    q, k, v = torch.randn(3, 4, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    table, lengths = torch.arange(3)[:, None], torch.full((3,), 9)
    expected = attend_plain(q.unsqueeze(2), k, v)[:, :, 0]
    assert torch.allclose(attention_reference(q, k, v, table, lengths), expected, atol=1e-6)
    assert torch.allclose(decode_attention(q, k, v, table, lengths), expected, atol=1e-6)


def test_a_growing_cache_may_be_a_view(library: Library) -> None:
    q, k, v = torch.randn(2, 4, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    table, lengths = torch.arange(2)[:, None], torch.full((2,), 9)
    views = k[:, :, :9], v[:, :, :9]
    expected = attend_plain(q.unsqueeze(2), *views)[:, :, 0]
    found = attention_native(library, q, *views, table, lengths)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("cap", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("size", [0.1, 10.0, 1e4])
def test_capped_scores(library: Library, cap: float, size: float) -> None:
    torch.manual_seed(0)
    q, k, v = size * torch.randn(3, 4, 16), torch.randn(3, 2, 37, 16), torch.randn(3, 2, 37, 16)
    table, lengths = torch.arange(3)[:, None].int(), torch.tensor([37, 1, 20]).int()
    wide = [x.double() for x in (q, k, v)]
    expected = attention_reference(*wide, table, lengths, softcap=cap, window=30)
    found = attention_native(library, q, k, v, table, lengths, softcap=cap, window=30)
    assert torch.allclose(found.double(), expected, atol=2e-5)


def test_nan_is_not_swallowed(library: Library) -> None:
    q, k, v = torch.randn(1, 1, 16), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 16)
    k[0, 0, 7, 3] = float("nan")
    table, lengths = torch.zeros(1, 1).int(), torch.tensor([20]).int()
    assert not torch.isfinite(attention_native(library, q, k, v, table, lengths)).any()


def test_odd_widths_run_on_torch() -> None:
    q, k = torch.randn(1, 1, 5), torch.randn(1, 1, 3, 5)
    table, lengths = torch.zeros(1, 1).int(), torch.tensor([3]).int()
    assert decode_attention(q, k, k, table, lengths).shape == (1, 1, 5)


def test_views_and_missing_scales_are_refused(library: Library) -> None:
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 6, 16)
    table, lengths = torch.zeros(1, 1).int(), torch.tensor([3]).int()
    with pytest.raises(ShapeMismatchError, match=r"lie alike.*strides \(96, 96, 32, 1\)"):
        attention_native(library, q, k[:, :, ::2], k[:, :, ::2], table, lengths)
    with pytest.raises(ShapeMismatchError, match="must lie alike"):
        attention_native(library, q, k[:, :, :3], torch.randn(1, 1, 3, 16), table, lengths)
    with pytest.raises(ShapeMismatchError, match=r"int8 keys need contiguous scales"):
        attention_native(library, q, k.to(torch.int8), k, table, lengths)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [16, 100, 512])
def test_sums_over_many_positions_are_as_exact_as_torch_s(
    library: Library, kind: str, size: int
) -> None:
    """Values whose mean is not 0, so that the sum grows with every position of a long row."""
    torch.manual_seed(size)
    table, counts, blocks = ragged([8192, 4097, 383, 129, 128, 127], size)
    cache = caches(blocks, 1, size, 64, "float32")
    keys, values, scales = cache["keys"], cache["values"] + 1, {}
    if kind == "int8":
        for name, x in (("key", keys), ("value", values)):
            scales[f"{name}_scales"] = x.abs().amax(-1) / 127
        keys = (keys / scales["key_scales"][..., None]).round().to(torch.int8)
        values = (values / scales["value_scales"][..., None]).round().to(torch.int8)
    elif kind == "bfloat16":
        keys, values = keys.bfloat16(), values.bfloat16()
    q = torch.randn(len(counts), 4, 64)
    wide = {name: x.double() for name, x in scales.items()}
    exact = attention_reference(q.double(), keys, values, table, counts, **wide)
    theirs = attention_reference(q, keys, values, table, counts, **scales) - exact
    ours = attention_native(library, q, keys, values, table, counts, **scales) - exact
    for row in range(len(counts)):
        error, allowed = (float(x[row].square().mean().sqrt()) for x in (ours, theirs))
        assert error < 2 * allowed, f"row of {int(counts[row])}: {error} against {allowed}"


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
def test_prefill_and_its_reference_equal_float64(
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


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    count=st.integers(0, 30),
    heads=st.integers(1, 4),
    size=st.sampled_from((1, 7, 16)),
    width=st.sampled_from((1, 8, 33)),
    heads_first=st.booleans(),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
        ]
    ),
    seed=st.integers(0, 99),
)
def test_equals_indexing(
    library: Library,
    count: int,
    heads: int,
    size: int,
    width: int,
    heads_first: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    del library
    torch.manual_seed(seed)
    dtype, kept_dtype = dtypes
    num_blocks = count // size + 3
    places = torch.randperm(num_blocks * size)[:count]
    blocks, offsets = places // size, places % size
    if heads_first:
        k, v = (torch.randn(heads, count, width).transpose(0, 1).to(dtype) for _ in range(2))
    else:
        k, v = (torch.randn(count, heads, width).to(dtype) for _ in range(2))
    memory = [torch.randn(num_blocks, heads, size, width).to(kept_dtype) for _ in range(2)]
    expected = [one.clone() for one in memory]
    store_reference(*expected, blocks, offsets, k, v)
    store_positions(*memory, blocks, offsets, k, v)
    assert torch.equal(memory[0], expected[0])
    assert torch.equal(memory[1], expected[1])


def test_special_numbers_are_rounded_as_torch_rounds(library: Library) -> None:
    del library
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, -1, 0x7FC00000]
    )
    x = bits.to(torch.int32).view(torch.float32).repeat(2, 1)[:, None]  # ties, overflow, inf, NaN
    memory = [torch.zeros(1, 1, 2, x.shape[-1], dtype=torch.bfloat16) for _ in range(2)]
    place = (torch.zeros(2, dtype=torch.long), torch.arange(2))
    store_positions(*memory, *place, x, -x)
    torch.testing.assert_close(memory[0][0, 0], x[:, 0].bfloat16(), atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(memory[1][0, 0], -x[:, 0].bfloat16(), atol=0, rtol=0, equal_nan=True)
