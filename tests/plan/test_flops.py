"""Numbers and operations of tower and projector are those of the modules, as torch counts them."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lapilli.config.model import DecoderConfig, VisionConfig
from lapilli.config.projector import parse_projector
from lapilli.lm import Decoder, Memory
from lapilli.modality.image.image import VisionTransformer
from lapilli.modality.projector import build_projector
from lapilli.plan.flops import (
    projector_numbers,
    projector_operations,
    request_flops,
    tower_operations,
)

VISION = VisionConfig(
    image_size=56, patch_size=14, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=2
)
DECODER = DecoderConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
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


@pytest.mark.parametrize("memory", [0, 5])
def test_a_request_is_what_torch_counts(memory):
    decoder = Decoder(DECODER).eval()
    decoder.add_cross_attention(2)
    x = torch.randn(1, 9, DECODER.hidden_size)
    beside = Memory.of_rows([x[0, :memory]], [(0, 0, 9)], rows=1, like=x) if memory else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = decoder(x, position_ids=torch.arange(9)[None], memory=beside)
        decoder.logits(hidden[:, -1])
    found = request_flops(DECODER, positions=9, memory=memory, every=2)
    assert found == counter.get_total_flops()


def test_an_answer_reads_its_memory_again_and_makes_its_keys_once():
    one = request_flops(DECODER, positions=9, memory=5, every=2, new_tokens=1)
    three = request_flops(DECODER, positions=9, memory=5, every=2, new_tokens=3)
    heads, width = DECODER.num_heads * DECODER.head_dim, DECODER.hidden_size
    layer = sum(a * b for a, b in DECODER.linear_widths)
    seen = 2 * width * DECODER.num_kv_heads * DECODER.head_dim
    more = DECODER.num_layers * (2 * 2 * layer + 4 * (10 + 11) * heads)
    more += 2 * (2 * 2 * (layer - seen) + 4 * 2 * 5 * heads)
    assert three - one == more + 2 * 2 * DECODER.vocab_size * width
    assert request_flops(DECODER, positions=9, new_tokens=1) < one
