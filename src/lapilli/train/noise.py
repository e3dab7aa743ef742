"""Noise on embeddings while training (NEFTune); pure functions of tensors.

uniform in -m .. m with m = alpha / sqrt(L * D): a sample of L positions of width D moves by the
same expected length, however long it is.

Source: Jain et al. 2023, "NEFTune", section 2.
"""

from collections.abc import Sequence

import torch

from lapilli.shapes import Float, Tensor


def noisy(vectors: Float[Tensor, "n D"], alpha: float) -> Float[Tensor, "n D"]:
    """The vectors of one sample or picture with noise on them."""
    size: float = alpha / vectors.numel() ** 0.5
    return vectors + (torch.rand_like(vectors) * 2 - 1) * size


def noisy_samples(
    vectors: Float[Tensor, "B T D"], segments: Sequence[Sequence[int]], alpha: float
) -> Float[Tensor, "B T D"]:
    """Rows with noise on every sample, and none on the padding after the last.

    Args:
        vectors: embeddings of all positions.
        segments: per row the lengths of its samples.
        alpha: size.
    """
    size = torch.zeros(vectors.shape[:2])
    for row, lengths in enumerate(segments):
        start = 0
        for length in lengths:
            size[row, start : start + length] = alpha / (length * vectors.shape[2]) ** 0.5
            start += length
    size = size.to(vectors.device, vectors.dtype)
    return vectors + (torch.rand_like(vectors) * 2 - 1) * size[..., None]
