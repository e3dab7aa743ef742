"""Cost of one tile on its way to the language model: numbers and operations; no torch.

    tower        the layers that its features come from
    projector    linear layers on features before or after they are joined, or a resampler's queries

A multiplication and an addition are two operations; norms, activations and softmax are left out.
"""

from lapilli.config.model import ProjectorConfig, VisionConfig
from lapilli.config.projector import tile_features

RESAMPLER_EXPANSION = 4
"""Width of the mlp of a resampler's layer, in widths of its queries."""

Product = tuple[int, int, int]
"""Rows, their width, and the width that they get."""


def tower_operations(vision: VisionConfig) -> float:
    """Return the operations of one tile through the layers that its features come from."""
    width, inner = vision.hidden_size, vision.intermediate_size
    seen = vision.grid.rows * vision.grid.columns + (vision.family == "clip")
    layers = vision.feature_layer % (vision.num_layers + 1)
    layer = 2 * seen * (4 * width**2 + 2 * width * inner) + 4 * seen**2 * width
    return float(layers * layer) + patch_operations(vision)


def patch_operations(vision: VisionConfig) -> float:
    """Return the operations that make vectors of the patches of one tile."""
    patches = vision.grid.rows * vision.grid.columns
    return 2.0 * patches * vision.num_channels * vision.patch_size**2 * vision.hidden_size


def projector_operations(vision: VisionConfig, projector: ProjectorConfig) -> float:
    """Return the operations of the features of one tile through the projector."""
    return sum(map(of_product, projector_products(vision, projector)), start=0.0)


def of_product(product: Product) -> float:
    """Return the operations of a matrix product."""
    rows, first, second = product
    return 2.0 * rows * first * second


def projector_products(vision: VisionConfig, projector: ProjectorConfig) -> list[Product]:
    """Return all products of a projector on one tile; the first takes what the tower has seen.

    Where the mean of neighbours comes first, the linear layers see fewer features.
    """
    features, width = vision.num_patches, projector.hidden_size
    if projector.kind == "identity":
        return []
    if projector.kind == "resampler":
        return _resampler(features, projector)
    left = tile_features(vision, projector).number
    rows = left if projector.pool_at == "input" else features
    first = (rows, projector.vision_size, width)
    return [first] + [(rows, width, width)] * (projector.depth - 1)


def _resampler(features: int, projector: ProjectorConfig) -> list[Product]:
    """Return the products of a resampler (modality/projector.py)."""
    queries, width = projector.num_queries, projector.hidden_size
    seen, inner = features + queries, RESAMPLER_EXPANSION * width
    layer = [
        (queries, width, width),
        (2 * seen, width, width),  # keys and values
        (queries, width, 2 * seen),  # scores and sums, of all heads together
        (queries, width, width),
        (2 * queries, width, inner),
    ]
    first, last = (features, projector.vision_size, width), (queries, width, width)
    return [first, *layer * projector.depth, last]


def projector_numbers(projector: ProjectorConfig) -> int:
    """Return the number of parameters of a projector."""
    first, width = projector.vision_size, projector.hidden_size
    if projector.kind == "identity":
        return 0
    if projector.kind == "resampler":
        inner = RESAMPLER_EXPANSION * width
        layer = 4 * width**2 + 2 * width * inner + inner + width + 3 * 2 * width
        ends = (first + 1) * width + 2 * width + (width + 1) * width
        return projector.num_queries * width + projector.depth * layer + ends
    bias = int(projector.bias)
    return (first + bias) * width + (projector.depth - 1) * (width + bias) * width
