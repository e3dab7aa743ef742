"""Decode attention over ragged blocks equals float64, whatever the cache holds."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.errors import ShapeMismatchError
from lapilli.kernels.attention import attention_native, attention_reference, decode_attention
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
