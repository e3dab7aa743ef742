"""The image modality: vision tower, projector and the learned end of a row.

    picture --prepare--> tiles [N, 3, H, W] --tower--> [N, P, E] --projector--> [N, P', D]
    --join--> [n, D]

P' is P, or fewer where the projector joins features (pooling, a resampler).
Knows neither prompts nor language models.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

from lapilli.config.model import ImageConfig, ProjectorConfig, VisionConfig
from lapilli.config.projector import tile_features
from lapilli.geometry import ImageSize
from lapilli.modality.image.modes import mode_of
from lapilli.modality.image.pixels import PreparedImage
from lapilli.modality.image.vision import VisionTransformer
from lapilli.modality.projector import build_projector
from lapilli.shapes import Float, Tensor

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

    def num_tokens(self, prepared: PreparedImage) -> int:
        """Return the positions that the picture takes, from its size alone."""
        has_newline = self._row_end is not None
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

    def embed(self, items: Sequence[PreparedImage]) -> list[Float[Tensor, "_ D"]]:
        """Return the features of every picture; all tiles share the tower's batches."""
        if not items:
            return []
        features = self.encode_tiles(torch.cat([item.pixel_values for item in items]))
        tiles = torch.split(features, [len(item.pixel_values) for item in items])
        return [self.merge(part, item) for part, item in zip(tiles, items, strict=True)]
