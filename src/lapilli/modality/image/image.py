"""Pictures as a modality: tower, projector and the learned row end, behind the Modality protocol.

    picture --prepare--> tiles [N, 3, H, W] --tower--> [N, P, E] --projector--> [N, P', D]
    --merge--> [n, D]

P' is P, or fewer where the projector joins features (pooling, a resampler).
Knows neither prompts nor language models.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

from lapilli.config.model import ImageConfig, ProjectorConfig, VisionConfig
from lapilli.config.projector import tile_features
from lapilli.modality.image.anyres import features_grid, num_tokens
from lapilli.modality.image.merge import merge_tiles
from lapilli.modality.image.pixels import PreparedImage, prepare
from lapilli.modality.image.vision import VisionTransformer
from lapilli.modality.projector import build_projector
from lapilli.shapes import Float, Tensor

# Tiles that go through the tower at once: bounds the memory that many pictures take.
TILE_LIMIT = 16


class ImageModality(nn.Module):
    """What the original calls vision tower, mm_projector and image_newline.

    Parameters are named `vision_tower.*`, `projector.*` and, where the checkpoint has one,
    `image_newline`.

    Source: LLaVA llava_arch.py encode_images and prepare_inputs_labels_for_multimodal.
    Note: `image_newline` exists only with `has_newline`; without it a row has no learned end.

    Raises:
        ConfigError: a projector that cannot pool the tower's features, or that leaves none which
            the merge could lay out.
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
        tile = tile_features(vision, projector)
        if image.aspect == "anyres" and image.merge != "flat":
            features_grid(image, tile)
        self.vision_tower = VisionTransformer(vision)
        self.projector = build_projector(projector, vision)
        self.image_newline: nn.Parameter | None = None
        if has_newline:
            width = projector.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)

    @property
    def _row_end(self) -> nn.Parameter | None:
        """The newline of a tiled picture; the original gives none to one that is not tiled."""
        return self.image_newline if self.image.aspect == "anyres" else None

    def prepare(self, raw: Image.Image) -> PreparedImage:
        """Tiles of a picture as numbers, on the CPU."""
        return prepare(raw, self.image, self.vision)

    def num_tokens(self, prepared: PreparedImage) -> int:
        """Positions that the picture takes, from its size alone."""
        return num_tokens(
            prepared.size,
            self.image,
            self.vision,
            projector=self.projector_config,
            has_newline=self._row_end is not None,
        )

    def tower_features(self, pixel_values: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P E"]:
        """What the tower sees in tiles, before the projector; at most TILE_LIMIT at once."""
        device = self.vision_tower.vision_model.embeddings.patch_embedding.weight.device
        parts = [
            self.vision_tower(tiles.to(device)) for tiles in torch.split(pixel_values, TILE_LIMIT)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def encode_tiles(self, pixel_values: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P D"]:
        """Projected features of tiles."""
        projected: Tensor = self.projector(self.tower_features(pixel_values))
        return projected

    def merge(self, features: Float[Tensor, "N P D"], item: PreparedImage) -> Float[Tensor, "n D"]:
        """The row of features that stands for one picture."""
        return merge_tiles(
            features,
            item.size,
            self.image,
            self.vision,
            newline=self._row_end,
            projector=self.projector_config,
        )

    def embed(self, items: Sequence[PreparedImage]) -> list[Float[Tensor, "_ D"]]:
        """Features of every picture; the tiles of all pictures share the tower's batches."""
        if not items:
            return []
        features = self.encode_tiles(torch.cat([item.pixel_values for item in items]))
        tiles = torch.split(features, [len(item.pixel_values) for item in items])
        return [self.merge(part, item) for part, item in zip(tiles, items, strict=True)]
