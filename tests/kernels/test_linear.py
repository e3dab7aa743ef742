"""Products with packed and with plain weights equal those in float64, whatever the shape."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lapilli.errors import ConfigError
from lapilli.kernels.library import Library, native, open_library
from lapilli.kernels.linear import (
    PackedLinear,
    dense,
    dense_reference,
    is_dense_native,
    linear_native,
    linear_op,
    linear_reference,
    linears,
    native_weights,
)
from lapilli.kernels.packing import Packed, round_rows
from lapilli.nn.linear import kept_linear
from lapilli.quant import QuantConfig
from lapilli.quant.quantize import round4, round8

ONCE = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

KINDS = ("int8", "symmetric", "zeros", "nonlinear")


def packed_weight(
    kind: str, shape: tuple[int, int], *, group: int = 32, bias: bool = False, seed: int = 0
) -> Packed:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random)
    offset = torch.randn(shape[0], generator=random) if bias else None
    if kind == "int8":
        return round8(weight, offset, group)
    return round4(weight, offset, QuantConfig(group_size=group, levels=kind, search=False))


def exact(x: torch.Tensor, packed: Packed, *, weight_only: bool) -> torch.Tensor:
    """The product in float64 of what the kernel is to see."""
    if weight_only:
        seen = x.double()
    else:
        values, scale = round_rows(x, packed.group_size)
        seen = (values.double() * scale.double()).view(len(x), -1)[:, : x.shape[1]]
    out = seen @ packed.dequantize().double().T
    return out if packed.plain_bias is None else out + packed.plain_bias.double()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    size = expected.abs().max().clamp(min=1e-6)
    assert ((found.double() - expected).abs().max() / size).item() < 3e-6


def one(
    library: Library, x: torch.Tensor, packed: Packed, *, weight_only: bool = False
) -> torch.Tensor:
    """The library's product with one weight."""
    return linear_native(library, x, [native_weights(packed)], weight_only=weight_only)[0]


shapes = st.tuples(
    st.one_of(st.integers(1, 14), st.sampled_from((16, 23, 24, 25, 47, 48, 61))),  # tokens
    st.one_of(st.integers(1, 300), st.sampled_from((32, 64, 128, 256))),  # inputs
    st.one_of(st.integers(1, 80), st.sampled_from((16, 48, 96))),  # outputs
)


@pytest.mark.slow
@ONCE
@given(
    shape=shapes,
    kind=st.sampled_from(KINDS),
    group=st.sampled_from((32, 64, 128)),
    bias=st.booleans(),
    weight_only=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_equals_float64(
    library: Library,
    threads: int,
    shape: tuple[int, int, int],
    kind: str,
    group: int,
    bias: bool,
    weight_only: bool,
    seed: int,
) -> None:
    tokens, inputs, outputs = shape
    packed = packed_weight(kind, (outputs, inputs), group=group, bias=bias, seed=seed)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))
    expected = exact(x, packed, weight_only=weight_only)
    found = one(library, x, packed, weight_only=weight_only)
    assert_close(found, expected)
    assert_close(linear_reference(x, packed, weight_only=weight_only), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_integers_never_overflow(library: Library, kind: str) -> None:
    inputs = 256
    weight = torch.ones(16, inputs)
    weight[1::2] = -1.0
    packed = (
        round8(weight, None, 128)
        if kind == "int8"
        else round4(weight, None, QuantConfig(levels=kind, search=False))
    )
    x = torch.ones(7, inputs)
    x[1] = -1.0
    x[2, ::2] = -1.0
    found = one(library, x, packed)
    assert_close(found, exact(x, packed, weight_only=False))


@pytest.mark.slow
def test_large_layer_on_threads(library: Library, threads: int) -> None:
    packed = packed_weight("symmetric", (520, 1056), group=128, bias=True)
    for tokens in (1, 8, 40):
        x = torch.randn(tokens, 1056, generator=torch.Generator().manual_seed(tokens))
        found = one(library, x, packed)
        assert_close(found, exact(x, packed, weight_only=False))


def test_rows_may_lie_apart(library: Library) -> None:
    packed = packed_weight("symmetric", (32, 64))
    wide = torch.randn(5, 100)
    found = one(library, wide[:, :64], packed)
    assert_close(found, exact(wide[:, :64].contiguous(), packed, weight_only=False))


def test_nan_is_not_swallowed(library: Library) -> None:
    packed = packed_weight("int8", (16, 64))
    x = torch.zeros(3, 64)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    found = one(library, x, packed)
    assert not torch.isfinite(found[0]).any()
    assert not torch.isfinite(found[1]).all()
    assert torch.equal(found[2], torch.zeros(16))


def test_zero_and_tiny_rows_give_zero(library: Library) -> None:
    packed = packed_weight("symmetric", (16, 64))
    found = one(library, torch.full((2, 64), 1e-38), packed)
    assert torch.equal(found, torch.zeros(2, 16))


def test_no_rows() -> None:
    layer = PackedLinear(packed_weight("symmetric", (16, 64)))
    assert layer(torch.empty(0, 64)).shape == (0, 16)


def test_any_leading_shape_and_dtype() -> None:
    layer = PackedLinear(packed_weight("int8", (24, 64)))
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    out = layer(x)
    assert out.shape == (2, 3, 24)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[1, 2], layer(x[1, 2].float()).bfloat16())


def test_without_the_library_the_reference_answers() -> None:
    layer = PackedLinear(packed_weight("symmetric", (24, 64)))
    x = torch.randn(4, 64)
    expected = layer(x)
    layer.library = None
    assert_close(layer(x), expected.double())


def test_gradients_are_refused() -> None:
    layer = PackedLinear(packed_weight("symmetric", (16, 64)))
    with pytest.raises(ConfigError, match=r"no gradients: run under torch\.no_grad"):
        layer(torch.randn(1, 64, requires_grad=True))


@pytest.mark.parametrize("kind", ["symmetric", "nonlinear"])
def test_custom_op_is_well_formed(kind: str) -> None:
    packed = packed_weight(kind, (16, 64))
    sizes = [16, 64, packed.group_size, 4]
    parts = (packed.data, packed.scales, None, packed.span_scales, None)
    arguments = (torch.randn(2, 64), *parts, sizes, False)
    torch.library.opcheck(linear_op, arguments, test_utils=("test_schema", "test_faketensor"))
    assert_close(linear_op(*arguments), PackedLinear(packed)(arguments[0]).double())


def test_the_library_is_used_where_it_is_there() -> None:
    assert PackedLinear(packed_weight("symmetric", (16, 64))).library is native()


@pytest.mark.slow
@ONCE
@given(
    tokens=st.integers(1, 40),
    outputs=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    kind=st.sampled_from(KINDS),
    weight_only=st.booleans(),
)
def test_weights_in_one_call_equal_weights_alone(
    library: Library,
    threads: int,
    tokens: int,
    outputs: list[int],
    kind: str,
    weight_only: bool,
) -> None:
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens))
    packed = [
        packed_weight(kind, (rows, 96), bias=bool(i % 2), seed=i) for i, rows in enumerate(outputs)
    ]
    layers = [PackedLinear(one, weight_only=weight_only) for one in packed]
    together = linears(x, layers)
    for layer, found in zip(layers, together, strict=True):
        assert torch.equal(found, layer(x))


def test_kinds_that_cannot_share_a_call() -> None:
    a, b = (PackedLinear(packed_weight("symmetric", (16, 64), group=g)) for g in (32, 64))
    c = PackedLinear(packed_weight("int8", (16, 64), group=32))
    assert len({a.kind, b.kind, c.kind}) == 3
    assert a.kind == PackedLinear(packed_weight("symmetric", (48, 64), group=32, seed=1)).kind


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


@ONCE
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    kept=st.sampled_from((torch.float16, torch.bfloat16)),
    size=st.sampled_from((1e-7, 1.0, 1e4)),
    seed=st.integers(0, 99),
)
def test_weights_of_16_bits_are_multiplied_as_their_floats(
    library: Library,
    threads: int,
    rows: int,
    inputs: int,
    outputs: int,
    bias: bool,
    kept: torch.dtype,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, inputs)
    weight = (size * torch.randn(outputs, inputs)).to(kept)  # the smallest are subnormal
    added = torch.randn(outputs).to(kept) if bias else None
    wide = functional.linear(x.double(), weight.double(), None if added is None else added.double())
    assert is_dense_native(x, weight)
    near = {"atol": 2e-5 * max(size, 1.0), "rtol": 2e-5}
    for product in (dense, dense_reference, kept_linear):
        found = product(x, weight, added)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wide, **near)


def test_many_rows_and_gradients_of_a_kept_weight() -> None:
    x, weight = torch.randn(2, 200, 24, requires_grad=True), torch.randn(5000, 24).half()
    bias = torch.randn(5000).half()
    found = kept_linear(x, weight, bias)
    expected = functional.linear(x, weight.float(), bias.float())
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(dim=0).expand_as(x), rtol=1e-3, atol=1e-3)
    narrow = kept_linear(x.detach().bfloat16(), weight, None)
    assert narrow.dtype == torch.bfloat16
    same = functional.linear(x.detach().bfloat16().float(), weight.float()).bfloat16()
    torch.testing.assert_close(narrow, same)


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


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_add_what_vectors_add(kind: str, group: int) -> None:
    """Sums of bytes are exact: only levels, summed over groups and not over spans, are rounded."""
    try:
        open_library("amxint8")
    except ConfigError:
        pytest.skip("no amxint8 here")
    found: dict[str, list[torch.Tensor]] = {}
    for name in ("amxint8", "avx512vnni"):
        library = open_library(name)
        if library is None:
            pytest.skip("nothing was compiled")
        for tokens, inputs, outputs in (
            (24, 128, 16),
            (47, 300, 33),
            (96, 1088, 80),
            (129, 640, 5),
        ):
            packed = packed_weight(kind, (outputs, inputs), group=group, bias=True, seed=tokens)
            x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens))
            found.setdefault(name, []).append(one(library, x, packed))
    open_library()
    for tiles, vectors in zip(found["amxint8"], found["avx512vnni"], strict=True):
        if kind == "nonlinear":
            assert_close(tiles, vectors.double())
        else:
            assert torch.equal(tiles, vectors)
