"""A tower in one call a layer equals the modules, and goes back to them for anything unusual."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lapilli.config.model import VisionConfig
from lapilli.kernels import tower as kernel
from lapilli.kernels.library import native
from lapilli.modality.image import fused_layer
from lapilli.modality.image.image import VisionAttention, VisionTransformer
from lapilli.quant.linear import QuantLinear
from lapilli.quant.quantize import round8

pytestmark = pytest.mark.skipif(native() is None, reason="nothing was compiled")


def make_tower(family: str = "clip", dtype: torch.dtype = torch.float32) -> VisionTransformer:
    torch.manual_seed(0)
    config = VisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=64,
        intermediate_size=144,
        num_layers=3,
        num_heads=2,
        family=family,
        activation="quick_gelu" if family == "clip" else "gelu_tanh",
    )
    tower = VisionTransformer(config).to(dtype).eval()
    for layer in tower.vision_model.encoder.layers:
        layer.fused.takes_floats = True
    return tower


def pack(tower: VisionTransformer) -> VisionTransformer:
    for path, module in list(tower.named_modules()):
        if isinstance(module, nn.Linear):
            tower.set_submodule(path, QuantLinear(round8(module.weight, module.bias, 32)))
    return tower


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that the call was made with, the comparisons with the modules left out."""
    seen: list[torch.Size] = []

    def counted(library: object, x: torch.Tensor, *given: object) -> torch.Tensor:
        if x.shape[1] != 7:
            seen.append(x.shape)
        return kernel.tower_layer(library, x, *given)

    monkeypatch.setattr(fused_layer, "tower_layer", counted)
    return seen


def by_modules(tower: VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
    plain = copy.deepcopy(tower)
    for layer in plain.vision_model.encoder.layers:
        layer.forward = layer.by_modules
    with torch.inference_mode():
        return plain(pixels)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda family: make_tower(family), 1e-5),
        (lambda family: make_tower(family, torch.bfloat16), 0.03),
        (lambda family: pack(make_tower(family)), 0.02),
    ],
    ids=["float32", "bfloat16", "int8"],
)
def test_features_equal_those_of_the_modules(
    family: str,
    make: Callable[[str], VisionTransformer],
    most: float,
    calls: list[torch.Size],
) -> None:
    tower = make(family)
    pixels = torch.randn(3, 3, 56, 56)
    with torch.inference_mode():
        found = tower(pixels)
    assert len(calls) == tower.num_used_layers
    expected = by_modules(tower, pixels)
    assert found.dtype == expected.dtype
    apart = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    assert apart.max().item() < most


def test_floats_wait_for_a_measurement(calls: list[torch.Size]) -> None:
    tower = make_tower()
    for layer in tower.vision_model.encoder.layers:
        layer.fused.takes_floats = False
    with torch.inference_mode():
        tower(torch.randn(1, 3, 56, 56))
        assert not calls
        pack(tower)(torch.randn(1, 3, 56, 56))
    assert len(calls) == 2


def test_tiles_do_not_see_each_other() -> None:
    tower = pack(make_tower())
    pixels = torch.randn(3, 3, 56, 56)
    with torch.inference_mode():
        together = tower(pixels)
        alone = torch.cat([tower(one[None]) for one in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


MOST_APART, LEAST_COSINE = 0.04, 0.998
"""The tolerance of a tower in 8 bits: features against those in float32, vector by vector."""


@pytest.mark.parametrize("larger", [1, 10])
def test_features_of_a_deep_tower_in_8_bits_stay_within_the_tolerance(larger: int) -> None:
    torch.manual_seed(0)
    config = VisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=128,
        intermediate_size=512,
        num_layers=13,
        num_heads=2,
    )
    tower = VisionTransformer(config).eval().requires_grad_(False)
    for path, weight in tower.named_parameters():
        is_norm = "norm" in path and path.endswith("weight")
        weight.copy_(torch.randn(weight.shape) * 0.05 + float(is_norm))
        if is_norm and "pre" not in path:
            weight[:2] *= larger  # channels that outgrow the others, as trained towers have them
    pixels = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        expected = tower(pixels)
        found = pack(tower)(pixels)
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert apart.mean().item() < MOST_APART
    assert torch.cosine_similarity(found, expected, dim=-1).min().item() > LEAST_COSINE


def layer_of(tower: VisionTransformer) -> nn.Module:
    return tower.vision_model.encoder.layers[0]


def hook(tower: VisionTransformer) -> None:
    layer_of(tower).mlp.fc1.register_forward_hook(lambda *_: None)


def another_activation(tower: VisionTransformer) -> None:
    layer_of(tower).mlp.act = nn.ReLU()


def another_module(tower: VisionTransformer) -> None:
    layer_of(tower).self_attn.q_proj = nn.Sequential(layer_of(tower).self_attn.q_proj)


def one_more_module(tower: VisionTransformer) -> None:
    layer_of(tower).self_attn.q_norm = nn.Identity()


def one_packed(tower: VisionTransformer) -> None:
    old = layer_of(tower).mlp.fc2
    layer_of(tower).mlp.fc2 = QuantLinear(round8(old.weight, old.bias, 32))


def another_forward(tower: VisionTransformer) -> None:
    attention = layer_of(tower).self_attn
    attention.forward = lambda x: torch.zeros_like(x)


@pytest.mark.parametrize(
    "change",
    [hook, another_activation, another_module, one_more_module, one_packed, another_forward],
)
def test_anything_unusual_runs_by_modules(
    change: Callable[[VisionTransformer], None],
    calls: list[torch.Size],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tower = make_tower()
    x = torch.randn(1, 17, 64)
    with torch.inference_mode():
        layer_of(tower)(x)  # seen by the call before the change
        assert len(calls) == 1
        change(tower)
        with caplog.at_level(logging.WARNING):
            found = layer_of(tower)(x)
        assert torch.equal(found, layer_of(tower).by_modules(x))
    assert len(calls) == 1
    assert ("runs module by module" in caplog.text or "run module by module" in caplog.text) == (
        change is another_forward
    )


def test_gradients_and_modes_run_by_modules(calls: list[torch.Size]) -> None:
    tower = make_tower()
    pixels = torch.randn(1, 3, 56, 56)
    tower(pixels).sum().backward()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(pixels)
    assert counter.get_total_flops() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tower(pixels)
    assert not calls


def test_new_weights_count_at_once(calls: list[torch.Size]) -> None:
    tower = make_tower()
    x = torch.randn(1, 17, 64)
    layer = layer_of(tower)
    with torch.inference_mode():
        layer(x)
        layer.mlp.fc2 = nn.Linear(144, 64)
        layer.layer_norm1.weight.mul_(3)
        torch.testing.assert_close(layer(x), layer.by_modules(x))
    assert len(calls) == 2


def test_a_step_that_the_call_lacks_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, calls: list[torch.Size]
) -> None:
    plain = VisionAttention.forward
    monkeypatch.setattr(VisionAttention, "forward", lambda self, x: 2 * plain(self, x))
    tower = make_tower()
    x = torch.randn(1, 17, 64)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        assert torch.equal(layer_of(tower)(x), layer_of(tower).by_modules(x))
    assert not calls
    assert "tower.h" in caplog.text


def test_copies_have_a_call_of_their_own(calls: list[torch.Size]) -> None:
    tower = make_tower()
    again = copy.deepcopy(tower)
    assert layer_of(again).fused._layer is layer_of(again)
    assert layer_of(again).fused.takes_floats
    with torch.inference_mode():
        again(torch.randn(1, 3, 56, 56))
    assert len(calls) == 2
