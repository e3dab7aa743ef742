"""A tiny vision language model with pictures and user vectors."""

import pytest
import torch

from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    PixelConfig,
    ProjectorConfig,
    VisionConfig,
)
from lapilli.geometry import ImageSize
from lapilli.lm.decoder import Decoder
from lapilli.modality.image.image import ImageModality
from lapilli.modality.vector import VectorModality
from lapilli.model import VisionLanguageModel

TEXT = DecoderConfig(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=256,
)
VISION = VisionConfig(
    image_size=28, patch_size=14, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2
)
IMAGE = ImageConfig(
    pixels=PixelConfig(crop_size=ImageSize(28, 28), shortest_edge=28),
    aspect="anyres",
    merge="spatial_unpad",
    pinpoints=(ImageSize(28, 56), ImageSize(56, 28)),
)


def build_tiny() -> VisionLanguageModel:
    image = ImageModality(
        IMAGE,
        VISION,
        ProjectorConfig(kind="mlp", vision_size=16, hidden_size=24, depth=2),
        has_newline=True,
    )
    user = VectorModality(
        ProjectorConfig(kind="linear", vision_size=5, hidden_size=24), name="user"
    )
    return VisionLanguageModel(Decoder(TEXT), {"image": image, "user": user})


@pytest.fixture
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    model = build_tiny().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model
