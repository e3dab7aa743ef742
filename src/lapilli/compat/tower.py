"""The vision tower as programs for the original see it: called with pixels, asked for its sizes."""

from collections.abc import Sequence

import torch
from torch import nn

from lapilli.compat.image_processor import CLIPImageProcessor
from lapilli.config.model import VisionConfig
from lapilli.modality.image.vision import VisionTransformer
from lapilli.shapes import Float, Tensor


class CLIPVisionTower(nn.Module):
    """Pixels -> features of the selected layer, always without gradients.

    Args:
        vision_tower: ours; its parameters are named `vision_tower.vision_model.*` here.
        image_processor: makes pixels for it.
    """

    is_loaded = True

    def __init__(
        self, vision_tower: VisionTransformer, image_processor: CLIPImageProcessor
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.image_processor = image_processor

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "N C H W"] | Sequence[Float[Tensor, "C H W"]]
    ) -> Tensor | list[Tensor]:
        """Features [N, patches, width]; of a list, one [1, patches, width] per picture.

        Note: pixels of another floating type are cast to the tower's; the original wants the
            type of its projector and fails otherwise.
        """
        if not isinstance(images, Tensor):
            return [self._features(image[None]) for image in images]
        return self._features(images)

    def _features(self, pixels: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P E"]:
        features: Tensor = self.vision_tower(pixels.to(self.device, self.dtype))
        return features

    def load_model(self, device_map: object = None) -> None:
        """Nothing: the tower is loaded with the model."""

    @property
    def config(self) -> VisionConfig:
        """Sizes of the tower."""
        return self.vision_tower.config

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        return self.vision_tower.vision_model.embeddings.patch_embedding.weight

    @property
    def dummy_feature(self) -> Float[Tensor, "1 E"]:
        """Zeros of one feature."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """Width of a feature."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches in one row of a tile."""
        return self.config.grid.columns

    @property
    def num_patches(self) -> int:
        """Patches of a tile; a kept class token is not counted, as in the original."""
        return self.config.grid.rows * self.config.grid.columns

    @property
    def select_layer(self) -> int:
        """Which hidden state is taken."""
        return self.config.feature_layer

    @property
    def select_feature(self) -> str:
        """`patch` or `cls_patch`."""
        return self.config.feature_select
