"""A tower's layer in one call equals its modules, for every instruction set and number format."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lapilli.config.model import Activation, VisionConfig
from lapilli.kernels.layer import PlainLinear
from lapilli.kernels.library import Library
from lapilli.kernels.linear import PackedLinear
from lapilli.kernels.tower import TowerFacts, multiplies_pairs, tower_layer
from lapilli.modality.image.image import VisionLayer
from lapilli.quant.linear import QuantLinear
from lapilli.quant.quantize import round8

ONCE = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PRODUCTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
PRODUCTS = (*PRODUCTS, "mlp.fc1", "mlp.fc2")


def make_layer(
    heads: int, width: int, inner: int, activation: Activation = "quick_gelu"
) -> VisionLayer:
    """A layer whose weights make every part of it matter."""
    torch.manual_seed(heads + width + inner)
    config = VisionConfig(
        image_size=14,
        patch_size=14,
        hidden_size=heads * width,
        intermediate_size=inner,
        num_layers=1,
        num_heads=heads,
        activation=activation,
    )
    layer = VisionLayer(config).eval().requires_grad_(False)
    for module in layer.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias.normal_(std=0.3)
        if isinstance(module, nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=1.5 * module.in_features**-0.5)
    return layer


def facts_of(layer: VisionLayer, activation: str = "quick_gelu") -> TowerFacts:
    first, second = layer.layer_norm1, layer.layer_norm2
    norms = (first.weight, first.bias, second.weight, second.bias)
    heads = layer.self_attn.num_heads
    return TowerFacts(norms=norms, heads=heads, activation=activation, eps=first.eps)


def plain_products(layer: VisionLayer) -> list[PlainLinear]:
    modules = [layer.get_submodule(path) for path in PRODUCTS]
    return [PlainLinear(module.weight, module.bias) for module in modules]


def packed(layer: VisionLayer, group: int) -> list[PackedLinear]:
    """Pack a layer's weights in 8 bits; the products as the call takes them."""
    found = []
    for path in PRODUCTS:
        module = layer.get_submodule(path)
        quant = QuantLinear(round8(module.weight, module.bias, group))
        layer.set_submodule(path, quant)
        found.append(PackedLinear(quant.packed))
    return found


def apart(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> float:
    """How far two results are apart, as a share of what the layer adds."""
    added = (expected.double() - x.double()).norm()
    return ((found.double() - expected.double()).norm() / added).item()


shapes = st.tuples(
    st.integers(1, 3),  # tiles
    st.one_of(st.integers(1, 14), st.sampled_from((31, 33, 70, 130))),  # positions
    st.sampled_from((1, 2, 3)),  # heads
    st.sampled_from((16, 32, 48, 64, 96)),  # width of a head
    st.sampled_from((16, 48, 128, 208, 272)),  # of the MLP
)


@pytest.mark.slow
@ONCE
@given(shape=shapes, group=st.sampled_from((32, 128)))
def test_every_format_equals_the_modules(
    shape: tuple[int, int, int, int, int], group: int, library: Library, threads: int
) -> None:
    tiles, positions, heads, width, inner = shape
    layer = make_layer(heads, width, inner)
    x = torch.randn(tiles, positions, heads * width)
    expected = layer.double().by_modules(x.double())
    layer.float()
    found = tower_layer(library, x, plain_products(layer), facts_of(layer))
    assert apart(found, expected, x) < 3e-6
    half = layer.bfloat16()
    seen = x.bfloat16()
    found = tower_layer(library, seen, plain_products(half), facts_of(half))
    by_modules = apart(half.by_modules(seen), expected, x)
    assert found.dtype == torch.bfloat16
    assert apart(found, expected, x) < max(1.2 * by_modules, 0.02)
    layer.float()
    products = packed(layer, group)
    found = tower_layer(library, x, products, facts_of(layer))
    # The same rounding; attention of bfloat16 pairs is where it may differ.
    assert apart(found, layer.by_modules(x), x) < (0.02 if multiplies_pairs(library) else 0.01)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
def test_activations(activation: Activation, library: Library) -> None:
    layer = make_layer(1, 64, 128, activation)
    x = 3 * torch.randn(1, 9, 64)
    found = tower_layer(library, x, plain_products(layer), facts_of(layer, activation))
    assert apart(found, layer.double().by_modules(x.double()), x) < 3e-6
    products = packed(layer.float(), 32)
    found = tower_layer(library, x, products, facts_of(layer, activation))
    assert apart(found, layer.by_modules(x), x) < 0.02


def test_rows_of_weights_may_lie_apart(library: Library) -> None:
    layer = make_layer(2, 32, 64)
    x = torch.randn(1, 8, 64)
    products = plain_products(layer)
    expected = tower_layer(library, x, products, facts_of(layer))
    wide = [torch.cat((one.weight, torch.full_like(one.weight, 7.0)), dim=1) for one in products]
    apart_in_memory = [
        PlainLinear(weight[:, : one.weight.shape[1]], one.bias)
        for weight, one in zip(wide, products, strict=True)
    ]
    assert torch.equal(tower_layer(library, x, apart_in_memory, facts_of(layer)), expected)


def test_large_scores_and_activations(library: Library) -> None:
    layer = make_layer(1, 64, 64)
    for path in PRODUCTS[:2]:
        layer.get_submodule(path).weight.mul_(20)
    layer.mlp.fc1.weight.mul_(100)
    x = torch.randn(1, 40, 64)
    expected = layer.double().by_modules(x.double())
    layer.float()
    found = tower_layer(library, x, plain_products(layer), facts_of(layer))
    assert apart(found, expected, x) < 1e-5
    found = tower_layer(library, x, packed(layer, 32), facts_of(layer))
    assert torch.isfinite(found).all()


def test_a_number_that_is_none_stays_in_its_tile(library: Library) -> None:
    layer = make_layer(1, 32, 32)
    x = torch.randn(2, 33, 32)
    x[1, 5, 3] = float("nan")
    for products in (plain_products(layer), packed(layer, 32)):
        found = tower_layer(library, x, products, facts_of(layer))
        assert torch.isfinite(found[0]).all()
        assert torch.isnan(found[1, 5]).any()
