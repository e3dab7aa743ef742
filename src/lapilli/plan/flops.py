"""Floating point operations and parameters, from a model's sizes; no torch, no model.

    tower    P patches a tile     forward alone while it is frozen
    project  n features of it     what the stage always trains
    layers   T positions          forward, gradients of the inputs, gradients of the weights
    head     m supervised ones    logits are made only where they count

A multiplication and an addition are two operations; norms, activations and softmax are left out.
Attention counts the whole square of positions, also where a kernel skips what a causal mask hides.

Source: Chowdhery et al. 2022 (PaLM) appendix B for the counting; tests/plan/test_plan.py compares
    it with torch.utils.flop_counter.
"""

from dataclasses import dataclass
from math import prod

from lapilli.config.model import DecoderConfig, ProjectorConfig, TextConfig, VisionConfig
from lapilli.config.projector import RESAMPLER_EXPANSION, tile_features

Product = tuple[int, int, int]
"""Rows, their width, and the width that they get."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of parameters in the parts of a model.

    Attributes:
        layers: in the linear layers of all decoder layers.
        head: in the head; 0 where it is the embedding.
        norms: in the decoder's norms and biases.
    """

    layers: int
    embedding: int
    head: int
    norms: int
    projector: int
    tower: int

    @property
    def language_model(self) -> int:
        """Return the number of parameters of the language model."""
        return self.layers + self.embedding + self.head + self.norms


@dataclass(frozen=True, slots=True)
class SampleFlops:
    """Operations of one sample.

    Attributes:
        tower: with all of its passes, as the others.
        adapter: of LoRA's two matrices beside every layer.
        recomputed: of layers whose activations were not kept.
    """

    tower: float
    projector: float
    layers: float
    attention: float
    head: float
    adapter: float
    recomputed: float

    @property
    def model(self) -> float:
        """Return what the step needs: the numerator of MFU."""
        return self.tower + self.projector + self.layers + self.attention + self.head + self.adapter

    @property
    def computed(self) -> float:
        """Return what the device does, recomputation included."""
        return self.model + self.recomputed


def sizes(text: TextConfig, vision: VisionConfig, projector: ProjectorConfig) -> Sizes:
    """Return the numbers of parameters of a model."""
    embedding = text.vocab_size * text.hidden_size
    return Sizes(
        layers=text.num_layers * sum(a * b for a, b in text.linear_widths),
        embedding=embedding,
        head=0 if text.tie_embeddings else embedding,
        norms=text.num_layers * text.vector_numbers + text.hidden_size,
        projector=projector_numbers(projector),
        tower=_num_tower(vision),
    )


def _num_tower(vision: VisionConfig) -> int:
    width, inner = vision.hidden_size, vision.intermediate_size
    layer = 4 * (width + 1) * width + 2 * width * inner + width + inner + 4 * width
    patches = vision.grid.rows * vision.grid.columns
    is_clip = vision.family == "clip"
    patch = vision.num_channels * vision.patch_size**2 * width + (0 if is_clip else width)
    positions = (patches + is_clip) * width
    norms = (4 if is_clip else 2) * width
    return vision.num_layers * layer + patch + positions + is_clip * width + norms


def sample_flops(
    parts: tuple[TextConfig, VisionConfig, ProjectorConfig],
    *,
    positions: float,
    tiles: float,
    supervised: float,
    trains_layers: bool,
    trains_tower: bool,
    lora_rank: int = 0,
    recomputes: bool = False,
) -> SampleFlops:
    """Return the operations of one sample.

    Args:
        parts: language model, tower, projector.
        positions: of the sample, image positions included.
        tiles: that the tower sees for it, one for a picture that is not tiled.
        supervised: positions that predict something.
        trains_layers: three passes instead of two, in which gradients come through; the head too.
        trains_tower: three passes instead of one.
        lora_rank: of adapters beside the layers; 0: none.
        recomputes: layers are computed again in the backward pass.
    """
    text, vision, projector = parts
    square = 4 * positions**2 * text.num_heads * text.head_dim * text.num_layers
    linear = 2 * positions * sizes(text, vision, projector).layers
    adapter = 2 * positions * num_adapter_parameters(text, lora_rank)
    through = [tiles * of_product(one) for one in projector_products(vision, projector)]
    # Nobody asks for the gradient of pixels, nor for that of what a frozen tower has seen.
    spared = through[0] if through and not trains_tower else 0.0
    pixels = tiles * patch_operations(vision) if trains_tower else 0.0
    # What a layer ends with is not computed again, unless an adapter is computed along with it.
    last = 0.0 if lora_rank else 2 * positions * text.num_layers * prod(text.linear_widths[-1])
    passes = 3 if trains_layers else 2
    return SampleFlops(
        tower=(3 if trains_tower else 1) * tiles * tower_operations(vision) - pixels,
        projector=3 * sum(through) - spared,
        layers=passes * linear,
        attention=3 * square,
        head=passes * 2 * supervised * text.vocab_size * text.hidden_size,
        adapter=3 * adapter,
        recomputed=(linear - last + square + adapter) if recomputes else 0.0,
    )


def request_flops(
    text: DecoderConfig,
    *,
    positions: int,
    new_tokens: int = 0,
    memory: int = 0,
    every: int | None = None,
) -> float:
    """Return the operations of reading a prompt and writing an answer, without its media's encoder.

    Three ways of telling a model who asks, with a question of q tokens: `positions = q + n` with a
    history of n tokens as text, q + k with k features in the sequence, or q with `memory = k`
    features beside it.

    Args:
        text: sizes of the language model.
        positions: of the prompt.
        new_tokens: of the answer; the last one is not read again.
        memory: features beside the sequence, seen by all of it; keys and values are made once.
        every: gated blocks stand before every n-th layer; None: there are none.
    """
    read = positions + max(0, new_tokens - 1)
    heads = text.num_heads * text.head_dim
    layer = sum(a * b for a, b in text.linear_widths)
    # The prompt's square, as everywhere here, and for each later token all before it and itself.
    pairs = positions**2 + sum(range(positions + 1, read + 1))
    found = text.num_layers * (2 * read * layer + 4 * pairs * heads)
    if memory and every is not None:
        seen = 2 * text.hidden_size * text.num_kv_heads * text.head_dim  # keys and values
        block = 2 * read * (layer - seen) + 2 * memory * seen + 4 * read * memory * heads
        found += text.num_layers // every * block
    logits = 2 * max(1, new_tokens) * text.vocab_size * text.hidden_size
    return float(found + logits)


def num_adapter_parameters(text: TextConfig, rank: int) -> int:
    """Return the parameters of adapters beside all linear layers but the head."""
    return text.num_layers * sum(rank * (a + b) for a, b in text.linear_widths)


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
