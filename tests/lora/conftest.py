"""A tiny decoder to put adapters on."""

import pytest
import torch

from lapilli.config.model import DecoderConfig
from lapilli.lm.decoder import Decoder

CONFIG = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
    qkv_bias=True,
)


@pytest.fixture
def build():
    def fresh() -> Decoder:
        torch.manual_seed(0)
        return Decoder(CONFIG).eval()

    return fresh


@pytest.fixture
def run():
    ids = torch.arange(7)[None]

    def logits(model: Decoder) -> torch.Tensor:
        hidden = model.forward(model.embed(ids), position_ids=ids)
        return model.logits(hidden)

    return logits
