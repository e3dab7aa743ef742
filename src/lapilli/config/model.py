"""Frozen records of a model: the language model, the tower, the projector and their joint.

Foreign config.json files become these in config/huggingface.py; nothing else reads a foreign key.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lapilli.errors import ConfigError
from lapilli.geometry import Grid, ImageSize

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
Merge = Literal["flat", "spatial", "spatial_unpad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Stretching of rotary frequencies.

    `linear` divides positions by the factor, `dynamic` is NTK-aware, `llama3` is Llama 3.1's rule.
    """

    kind: Literal["linear", "dynamic", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A Llama-shaped decoder; what its families differ in is a field each.

    Attributes:
        sliding_window: positions that a local layer sees, its own included; None: all before it.
        full_layers: numbers of the layers that see everything although there is a window.
        rope_theta: base of the rotary positions.
        local_rope_theta: the base in layers that are not among `full_layers`, without scaling.
        qk_norm: queries and keys go through a norm, head by head, before they are rotated.
        norm_offset: what is added to the weight of every norm, which then multiplies in float32.
        post_norms: attention and MLP have a norm behind them as well, before the residual.
        query_scalar: scores are divided by its square root; None: the width of a head.
        attention_softcap: c, where a score s becomes c tanh(s / c).
        logit_softcap: the same of logits.
        embedding_scale: factor on the vectors of tokens, not on those of pictures.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    family: str = "llama"
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    activation: Activation = "silu"
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.num_kv_heads}"
            )

    def is_local(self, layer: int) -> bool:
        """Return whether a layer has the sliding window and local rotary positions."""
        return layer not in self.full_layers

    def window(self, layer: int) -> int | None:
        """Return how many positions a layer sees; None: all before it."""
        return self.sliding_window if self.is_local(layer) else None

    @property
    def linear_widths(self) -> list[tuple[int, int]]:
        """Input and output width of the linear layers of one decoder layer."""
        width, inner = self.hidden_size, self.intermediate_size
        queries, groups = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = [(width, queries), (width, groups), (width, groups), (queries, width)]
        return [*attention, (width, inner), (width, inner), (inner, width)]

    @property
    def vector_numbers(self) -> int:
        """Numbers in the norms and biases of one layer."""
        queries, groups = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            (4 if self.post_norms else 2) * self.hidden_size
            + self.qk_norm * 2 * self.head_dim
            + self.qkv_bias * (queries + 2 * groups)
            + self.output_bias * self.hidden_size
            + self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MptConfig:
    """MosaicML's MPT: ALiBi instead of rotary positions, fused qkv, tied embeddings."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    family: str = "mpt"
    expansion_ratio: int = 4
    norm_eps: float = 1e-5
    alibi_bias_max: int = 8
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    tie_embeddings: bool = True

    @property
    def num_kv_heads(self) -> int:
        """Every query head has its own key and value."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def intermediate_size(self) -> int:
        """Width between the two linear layers of the feed-forward block."""
        return self.expansion_ratio * self.hidden_size

    @property
    def linear_widths(self) -> list[tuple[int, int]]:
        """Input and output width of the linear layers of one block."""
        width, inner = self.hidden_size, self.intermediate_size
        return [(width, 3 * width), (width, width), (width, inner), (inner, width)]

    @property
    def vector_numbers(self) -> int:
        """Numbers in the norms of one block; there are no biases."""
        return 2 * self.hidden_size


TextConfig = DecoderConfig | MptConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """A CLIP- or SigLIP-shaped vision transformer, and which of its hidden states are taken."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    family: Literal["clip", "siglip"] = "clip"
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    num_channels: int = 3
    feature_layer: int = -2
    # drop_first: without the first feature, whatever it is. Hugging Face does so even to a SigLIP
    # tower, whose first feature is a patch.
    feature_select: Literal["patch", "cls_patch", "drop_first"] = "patch"

    @property
    def grid(self) -> Grid:
        """Patches of one tile."""
        side = self.image_size // self.patch_size
        return Grid(side, side)

    @property
    def num_patches(self) -> int:
        """Features of one tile after selection."""
        has_class_token = self.family == "clip" and self.feature_select != "patch"
        is_short = self.feature_select == "drop_first"
        return self.grid.rows * self.grid.columns + int(has_class_token) - int(is_short)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorConfig:
    """From tower width to language model width; `depth` linear layers, an activation between.

    Attributes:
        depth: linear layers of an mlp, cross-attention layers of a resampler.
        pool: side of the square of neighbours that an mlp averages; 1: none.
        pool_at: whether the mean is taken before the mlp or after it.
        num_queries: positions that a resampler leaves of a tile.
    """

    kind: Literal["linear", "mlp", "identity", "resampler"]
    vision_size: int
    hidden_size: int
    depth: int = 1
    activation: Activation = "gelu"
    bias: bool = True
    pool: int = 1
    pool_at: Literal["input", "output"] = "input"
    num_queries: int = 0

    def __post_init__(self) -> None:
        if self.pool < 1 or (self.pool > 1 and self.kind != "mlp"):
            raise ConfigError(
                f"a {self.kind} projector with pool {self.pool}: expected 1, or more for an mlp "
                "(mlp1x_gelu is a linear layer)"
            )
        if (self.num_queries > 0) != (self.kind == "resampler") or self.num_queries < 0:
            raise ConfigError(
                f"a {self.kind} projector with num_queries {self.num_queries}: expected at least 1 "
                "for a resampler, 0 for every other"
            )

    @property
    def joins(self) -> bool:
        """True if several features become one, so that a tile has fewer positions than patches."""
        return self.pool > 1 or self.kind == "resampler"


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelConfig:
    """Contents of preprocessor_config.json: the steps from a tile to numbers."""

    crop_size: ImageSize
    shortest_edge: int | None = None
    resize_to: ImageSize | None = None
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """Settings of cutting a picture into tiles and of laying their features into one row.

    Attributes:
        aspect: name of an image mode (modality/image/modes), which checks the rest.
        pinpoints: resolutions that the mode may choose from.
        rounds_unpad: Hugging Face rounds the unpadded size to 7 decimals before truncating, the
            original does not.
    """

    pixels: PixelConfig
    aspect: str = "square"
    merge: Merge = "flat"
    pinpoints: tuple[ImageSize, ...] = ()
    rounds_unpad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityConfig:
    """Settings of a declared modality; every kind is a class over it (config/modalities.py).

    Attributes:
        fusion: "tokens": features stand in the sequence; "cross_attention": they take no position,
            and gated blocks between the layers look at them (lm/cross_attention.py).
        every: with cross-attention: a block before every n-th layer.
    """

    kind: ClassVar[str] = ""

    fusion: str = "tokens"
    every: int | None = None

    @property
    def is_attended(self) -> bool:
        """Return whether features are looked at from beside the sequence."""
        return self.fusion == "cross_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenConfig:
    """Special ids and the token switches of the original."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    # The vocabulary entry that stands for a picture where a prompt is tokenized whole, as Hugging
    # Face does; None: the text between pictures is, each piece for itself, as the original does.
    image_id: int | None = None
    use_start_end: bool = False
    use_patch_token: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything about a checkpoint that its config files say."""

    text: TextConfig
    tokens: TokenConfig
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    image: ImageConfig | None = None
    vision_source: str | None = None  # mm_vision_tower: a directory or a hub id
    vision_in_checkpoint: bool = False
    has_newline: bool = False
    modalities: tuple[tuple[str, ModalityConfig], ...] = ()  # besides "image", by name
    layout: Literal["llava", "hf_llava", "hf_llava_next", "text"] = "llava"
    torch_dtype: str | None = None
    # tokenizer_model_max_length: the original truncates the fused row to it.
    max_length: int | None = None
    context_length: int = 2048
    padding_side: Literal["left", "right"] = "right"
    template: str | None = None  # lapilli_template: what lapilli recorded when it wrote the files
