"""Fresh weights for models that start from nothing; knows layers, no families."""

import torch
from torch import nn


def initialise(model: nn.Module, seed: int, *, depth: int) -> None:
    """Small normal weights, zero biases; layers that end a residual branch are scaled down.

    Args:
        model: every Linear, Conv2d and Embedding in it is filled anew; norms keep their ones.
        seed: of the generator.
        depth: layers of the model; there are two residual branches in each.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            continue
        fan_in = module.weight[0].numel()
        std = 0.02 if isinstance(module, nn.Embedding) else fan_in**-0.5
        if name.endswith(("out_proj", "o_proj", "fc2", "down_proj")):
            std /= (2 * depth) ** 0.5
        nn.init.normal_(module.weight, std=std, generator=generator)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
