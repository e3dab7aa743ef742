"""Loss functions and noise on embeddings (NEFTune); pure functions of tensors, no models.

cross_entropy_sum / all supervised positions of a step   "tokens": every token weighs the same
mean of the means of the micro-batches                   "llava": as in the original's trainer
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F  # noqa: N812  torch's own habit

from lapilli.errors import ConfigError
from lapilli.nn.linear import rounded
from lapilli.shapes import Bool, Float, Int, Tensor
from lapilli.train.recipe import Reduction


def cross_entropy_sum(
    logits: Float[Tensor, "M V"], targets: Int[Tensor, " M"]
) -> Float[Tensor, ""]:
    """Return the sum of the negative log likelihoods of the targets, in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def supervised(
    input_ids: Int[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]
) -> tuple[Bool[Tensor, "B T"], Int[Tensor, " M"]]:
    """Return the positions whose next token counts, and those next tokens.

    A position predicts its successor, so the mask moves one to the left and the last position never
    counts.
    """
    where = torch.zeros_like(loss_mask)
    where[:, :-1] = loss_mask[:, 1:]
    return where, input_ids[:, 1:][loss_mask[:, 1:]]


def scores(
    head: Callable[[Tensor], Float[Tensor, "R V"]], hidden: Float[Tensor, "M D"]
) -> Float[Tensor, "M V"]:
    """Return what a head makes of M states.

    M is another in every batch, so the head sees R, `rounded`, of them: it takes each by itself.
    """
    count = len(hidden)
    return head(F.pad(hidden, (0, 0, 0, rounded(count) - count)))[:count]


def scales(counts: list[int], reduction: Reduction) -> list[float]:
    """Return the factors of the micro-batches' sums that make the step's loss their total.

    Raises:
        ConfigError: nothing is supervised, or (llava) one micro-batch has nothing.
    """
    total = sum(counts)
    if total == 0 or (reduction == "llava" and 0 in counts):
        raise ConfigError(
            f"no supervised token among {len(counts)} micro-batches with {counts}: "
            "check the loss mask of the data"
        )
    if reduction == "tokens":
        return [1.0 / total] * len(counts)
    return [1.0 / (count * len(counts)) for count in counts]


def noisy(vectors: Float[Tensor, "n D"], alpha: float) -> Float[Tensor, "n D"]:
    """Add noise of size `alpha` to the vectors of one sample or picture."""
    size: float = alpha / vectors.numel() ** 0.5
    return vectors + (torch.rand_like(vectors) * 2 - 1) * size


def noisy_samples(
    vectors: Float[Tensor, "B T D"], segments: Sequence[Sequence[int]], alpha: float
) -> Float[Tensor, "B T D"]:
    """Add noise to every sample, and none to the padding after the last.

    Args:
        vectors: embeddings of all positions.
        segments: per sequence the lengths of its samples.
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
