"""Small random decoders and samples before their first layer."""

from collections.abc import Sequence
from typing import Any

import torch

from lapilli.config.model import DecoderConfig
from lapilli.lm.decoder import Decoder
from lapilli.quant.activations import Sample

WIDTH = 64


def small_decoder(**more: Any) -> Decoder:
    """Return a float32 decoder whose gains and biases are not the neutral ones."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 90,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_positions": 256,
    }
    decoder = Decoder(DecoderConfig(**(shape | more))).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder


def samples_of(decoder: Decoder, lengths: Sequence[int] = (40, 25, 40, 31)) -> list[Sample]:
    """Return samples whose first third are features, with a few channels that stick out."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in lengths:
        ids = torch.randint(0, decoder.config.vocab_size, (length,), generator=generator)
        hidden = decoder.embed(ids[None]).float().clone()
        hidden[..., ::13] *= 12
        is_picture = torch.arange(length) < length // 3
        counts = torch.arange(length) >= length // 2
        found.append(Sample(hidden, is_picture, counts, ids))
    return found
