"""The image modality: vision tower, projector and the learned end of a row.

    picture --prepare--> tiles [N, 3, H, W] --tower--> [N, P, E] --projector--> [N, P', D]
    --join--> [n, D]

P' is P, or fewer where the projector joins features (pooling, a resampler). The tower is the vision
transformer of CLIP and SigLIP, with their parameter names:

    pixel_values -> patches (+ class token) + positions -> layers -> features

Only the layers up to the selected hidden state are computed; the others are kept, so that a
checkpoint is saved as it was loaded. Knows neither prompts nor language models.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from lapilli.config.model import ImageConfig, ProjectorConfig, VisionConfig
from lapilli.config.projector import tile_features
from lapilli.errors import ConfigError
from lapilli.geometry import ImageSize
from lapilli.modality.image.fused_layer import FusedVisionLayer
from lapilli.modality.image.modes import mode_of
from lapilli.modality.image.pixels import PreparedImage
from lapilli.modality.projector import build_projector, output_layers
from lapilli.nn.attention import attend_all
from lapilli.nn.layers import MLP
from lapilli.shapes import Float, Tensor


class VisionEmbeddings(nn.Module):
    """Patches as vectors, with positions, and CLIP's class token in front."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, clip = config.hidden_size, config.family == "clip"
        patches = config.grid.rows * config.grid.columns
        if clip:
            self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, config.patch_size, config.patch_size, bias=not clip
        )
        self.position_embedding = nn.Embedding(patches + int(clip), width)
        self.has_class_token = clip

    def forward(self, pixel_values: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P E"]:
        """Return the input of the first layer."""
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [N, P, E]
        if self.has_class_token:
            token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat((token, x), dim=1)
        out: Tensor = x + self.position_embedding.weight
        return out


class VisionAttention(nn.Module):
    """Attention of every patch to every patch of its tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.num_heads = config.num_heads

    def forward(self, x: Float[Tensor, "N P E"]) -> Float[Tensor, "N P E"]:
        """Return the block's update, without the residual."""
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(attend_all(q, k, v).transpose(1, 2).flatten(2))
        return out


class VisionLayer(nn.Module):
    """Attention and MLP, each with its norm before and its residual around."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.intermediate_size, activation=config.activation)
        self.fused = FusedVisionLayer(self)

    def forward(self, x: Float[Tensor, "N P E"]) -> Float[Tensor, "N P E"]:
        """Return the hidden states after this layer."""
        found = self.fused.run(x)
        return self.by_modules(x) if found is None else found

    def by_modules(self, x: Float[Tensor, "N P E"]) -> Float[Tensor, "N P E"]:
        """Compute `forward` module by module."""
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionEncoder(nn.Module):
    """The layers, which the files call `encoder`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))


class VisionStack(nn.Module):
    """The module that the files call `vision_model`; `pre_layrnorm` is CLIP's own spelling."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        if config.family == "clip":
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class VisionTransformer(nn.Module):
    """A tower that returns one hidden state of the patches.

    `feature_layer` counts hidden states as LLaVA does: 0 is the input of the first layer, i the
    output of layer i, negative numbers from the end; `post_layernorm` is never applied, because
    hidden states are taken before it.

    Source: LLaVA clip_encoder.py feature_select; Hugging Face CLIPVisionModel and
    SiglipVisionModel with output_hidden_states.

    Raises:
        ConfigError: heads that do not divide the width, or no such hidden state.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ConfigError(
                f"vision hidden_size {config.hidden_size} is not a multiple of "
                f"num_heads {config.num_heads}"
            )
        states = config.num_layers + 1
        if not -states <= config.feature_layer < states:
            raise ConfigError(
                f"feature_layer {config.feature_layer} does not exist: a tower of "
                f"{config.num_layers} layers has hidden states 0 to {config.num_layers}, "
                f"or {-states} to -1"
            )
        self.config = config
        self.vision_model = VisionStack(config)
        self.gradient_checkpointing = False

    @property
    def num_used_layers(self) -> int:
        """Return the number of layers that the selected hidden state needs."""
        return self.config.feature_layer % (self.config.num_layers + 1)

    def forward(self, pixel_values: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P E"]:
        """Return the features of every tile, [N, VisionConfig.num_patches, E].

        Raises:
            ConfigError: tiles of another size than the tower was made for.
        """
        side = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (side, side):
            height, width = pixel_values.shape[-2:]
            raise ConfigError(
                f"the vision tower reads tiles of {side}x{side} pixels, found {width}x{height}"
            )
        stack = self.vision_model
        x: Tensor = stack.embeddings(pixel_values)
        if self.config.family == "clip":
            x = stack.pre_layrnorm(x)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in stack.encoder.layers[: self.num_used_layers]:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        drops_class_token = self.config.family == "clip" and self.config.feature_select == "patch"
        if drops_class_token or self.config.feature_select == "drop_first":
            x = x[:, 1:]
        return x


# Tiles that go through the tower at once: bounds the memory that many pictures take.
TILE_LIMIT = 16


class ImageModality(nn.Module):
    """The vision tower, mm_projector and image_newline of the original, with an image mode.

    Parameters are named `vision_tower.*`, `projector.*` and, where the checkpoint has one,
    `image_newline`.

    Source: LLaVA llava_arch.py encode_images and prepare_inputs_labels_for_multimodal.
    Note: `image_newline` exists only with `has_newline`; without it a row has no learned end.

    Raises:
        ConfigError: a projector that cannot pool the tower's features, or that leaves none which
            the merge could lay out; resolutions that are missing.
        UnsupportedModelError: an image mode that lapilli does not have.
    """

    name = "image"

    def __init__(
        self,
        image: ImageConfig,
        vision: VisionConfig,
        projector: ProjectorConfig,
        *,
        has_newline: bool = False,
    ) -> None:
        super().__init__()
        self.image = image
        self.vision = vision
        self.projector_config = projector
        self.tile = tile_features(vision, projector)
        self.mode = mode_of(image)
        # What no merge can lay out is refused here and not at the first picture.
        square = ImageSize(vision.image_size, vision.image_size)
        self.mode.num_tokens(square, image, self.tile, has_newline=has_newline)
        self.vision_tower = VisionTransformer(vision)
        self.projector = build_projector(projector, vision)
        self.image_newline: nn.Parameter | None = None
        if has_newline:
            width = projector.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)

    @property
    def _row_end(self) -> nn.Parameter | None:
        """Return the newline of a tiled picture, None where the mode makes one tile."""
        return self.image_newline if self.mode.is_tiled else None

    def prepare(self, raw: Image.Image) -> PreparedImage:
        """Return the tiles of a picture as numbers, on the CPU."""
        return self.mode.prepare(raw, self.image, self.vision)

    def overview(self, prepared: PreparedImage) -> PreparedImage:
        """Return the whole picture in one tile, without those of its details.

        A tiled mode has it as its first tile; a picture of another mode stays as it is.
        """
        if not self.mode.is_tiled:
            return prepared
        return PreparedImage(prepared.pixel_values[:1].clone(), prepared.size)

    def num_tokens(self, prepared: PreparedImage) -> int:
        """Return the positions that the picture takes, from its size, or as an overview."""
        has_newline = self._row_end is not None
        if self.mode.is_tiled and len(prepared.pixel_values) == 1:
            return self.mode.num_overview_tokens(self.image, self.tile, has_newline=has_newline)
        return self.mode.num_tokens(prepared.size, self.image, self.tile, has_newline=has_newline)

    def tower_features(self, pixel_values: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P E"]:
        """Return the tower's features of tiles, before the projector; TILE_LIMIT at once."""
        device = self.vision_tower.vision_model.embeddings.patch_embedding.weight.device
        parts = [
            self.vision_tower(tiles.to(device)) for tiles in torch.split(pixel_values, TILE_LIMIT)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def encode_tiles(self, pixel_values: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P D"]:
        """Return the projected features of tiles."""
        projected: Tensor = self.projector(self.tower_features(pixel_values))
        return projected

    def merge(self, features: Float[Tensor, "N P D"], item: PreparedImage) -> Float[Tensor, "n D"]:
        """Return the row of features that stands for one picture."""
        return self.mode.join(features, item.size, self.image, self.tile, newline=self._row_end)

    def output_layers(self) -> list[nn.Linear]:
        """Return the linear layers whose outputs, or means of them, are the features."""
        return output_layers(self.projector)

    def embed(self, items: Sequence[PreparedImage]) -> list[Float[Tensor, "_ D"]]:
        """Return the features of every picture; all tiles share the tower's batches."""
        if not items:
            return []
        features = self.encode_tiles(torch.cat([item.pixel_values for item in items]))
        tiles = torch.split(features, [len(item.pixel_values) for item in items])
        return [self.merge(part, item) for part, item in zip(tiles, items, strict=True)]
