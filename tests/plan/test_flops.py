"""Numbers and operations of tower and projector are those of the modules, as torch counts them."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lapilli.config.model import VisionConfig
from lapilli.config.projector import parse_projector
from lapilli.modality.image.image import VisionTransformer
from lapilli.modality.projector import build_projector
from lapilli.plan.flops import projector_numbers, projector_operations, tower_operations

VISION = VisionConfig(
    image_size=56, patch_size=14, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=2
)
NAMES = [
    "linear",
    "mlp2x_gelu",
    "mlp3x_gelu",
    "pool2x2_mlp2x_gelu",
    "mlp2x_gelu_pool2x2",
    "resampler5",
    "resampler3x2",
    "identity",
]


def counted(build, *shape):
    """What a module does with an input; on the meta device no kernel of ours replaces torch's."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter, sdpa_kernel(SDPBackend.MATH):
        module = build().requires_grad_(False)
        module(torch.empty(shape))
    return counter.get_total_flops(), sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_projector_costs_what_it_does(name, tiles):
    config = parse_projector(name, vision_size=32, hidden_size=32 if name == "identity" else 48)
    expected = tiles * projector_operations(VISION, config), projector_numbers(config)
    found = counted(lambda: build_projector(config, VISION), tiles, VISION.num_patches, 32)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_a_tower_ends_at_the_layer_that_is_used(family, layer):
    vision = dataclasses.replace(VISION, family=family, feature_layer=layer)
    found, _ = counted(lambda: VisionTransformer(vision), 1, 3, 56, 56)
    assert found == tower_operations(vision)
