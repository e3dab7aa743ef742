"""The base of an image mode: how a picture becomes tiles, and their features one row.

A mode without methods of its own sees a picture as one tile.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from PIL import Image

from lapilli.config.model import ImageConfig, Merge, VisionConfig
from lapilli.config.projector import TileFeatures
from lapilli.errors import FusionError, MediaError
from lapilli.geometry import ImageSize
from lapilli.modality.image.pixels import PreparedImage, size_of, tile_values
from lapilli.shapes import Float, Tensor


class ImageMode(ABC):
    """A way from a picture to tiles, and from the features of the tiles to one row.

    Its methods get `size`, the picture as it was opened; `config`, with the resolutions, the pixel
    arithmetic and how features are merged; and `tile`, what the tower and the projector leave of a
    tile, whose `side` is in pixels.

    Attributes:
        name: `image_aspect_ratio` in config.json of the original layout.
        is_tiled: a picture becomes several tiles. Only then a row may end in `image_newline`: the
            original gives none to a picture of one tile.
        merge: `mm_patch_merge_type` of a new model.
        hf_types: `model_type` of Hugging Face's layout that does the same, by
            `mm_patch_merge_type`; a merge that is not there can be kept in the original's alone.
    """

    name: ClassVar[str]
    is_tiled: ClassVar[bool] = False
    merge: ClassVar[Merge] = "flat"
    hf_types: ClassVar[Mapping[Merge, str]] = {}

    def check(self, config: ImageConfig) -> None:
        """Check that a configuration has what the mode needs.

        Raises:
            ConfigError: something is missing.
        """
        del config

    @abstractmethod
    def cut(self, image: Image.Image, config: ImageConfig) -> list[Image.Image]:
        """Return the pictures, of any mode, that are resized and cropped to one tile each.

        Raises:
            MediaError: it would take too much memory.
        """

    def prepare(
        self, image: Image.Image, config: ImageConfig, vision: VisionConfig | None = None
    ) -> PreparedImage:
        """Return the normalised tiles of one picture, float32.

        Args:
            image: RGB (see `decode.to_rgb`), or another mode, see `pixels.tile_values`.
            config: as of every method.
            vision: when given, its image_size is compared with what comes out.

        Raises:
            ConfigError: the tiles are not what the tower reads.
            MediaError: the picture has no pixels, or resizing it would take too much memory.

        Note: a picture 1 or 3 pixels high is a picture here; the original takes it for
            channel-first numbers and fails or scrambles it (compat/ does so too).
        """
        size = size_of(image)
        if not size.height or not size.width:
            raise MediaError(f"the picture is empty: {size} pixels")
        return PreparedImage(tile_values(self.cut(image, config), config.pixels, vision), size)

    def num_tiles(self, size: ImageSize, config: ImageConfig, side: int) -> int:
        """Return how many pictures `cut` makes, for tiles of `side` pixels."""
        del size, config, side
        return 1

    def num_tokens(
        self, size: ImageSize, config: ImageConfig, tile: TileFeatures, *, has_newline: bool
    ) -> int:
        """Return how many features `join` makes: the positions of the picture in a prompt.

        `has_newline` says whether `join` will be given a newline vector.

        Raises:
            ConfigError: the configuration cannot lay these features out.
        """
        tiles = self.num_tiles(size, config, tile.side)
        ends_in_newline = has_newline and config.merge == "spatial_unpad"
        return tiles * tile.number + int(ends_in_newline)

    def num_overview_tokens(
        self, config: ImageConfig, tile: TileFeatures, *, has_newline: bool
    ) -> int:
        """Return how many features `join` makes of the first tile alone."""
        return tile.number + int(has_newline and config.merge == "spatial_unpad")

    def join(
        self,
        features: Float[Tensor, "N P D"],
        size: ImageSize,
        config: ImageConfig,
        tile: TileFeatures,
        *,
        newline: Float[Tensor, " D"] | None,
    ) -> Float[Tensor, "n D"]:
        """Return one row of features, as long as `num_tokens` says.

        `features` are those of the tiles, in the order of `cut`. `newline` is the learned end of a
        row; a single tile gets one at its end when the merge is spatial_unpad.

        Raises:
            ConfigError: features that have no place in a map: a kept class token, a resampler's.
            FusionError: not the tiles that the picture's size asks for.

        Source: LLaVA llava_arch.py, prepare_inputs_labels_for_multimodal.
        """
        del size, tile
        if config.merge == "flat":
            return features.flatten(0, 1)
        if len(features) > 1:
            raise FusionError(
                f"{len(features)} tiles and merge {config.merge!r}, but image_aspect_ratio is "
                f"{config.aspect!r}, which does not say how several tiles lie side by side: use "
                "merge 'flat'"
            )
        if newline is None or config.merge != "spatial_unpad":
            return features[0]
        return torch.cat([features[0], newline[None]])

    def llava_keys(self, side: int) -> dict[str, object]:
        """Return the keys of a new model in the original layout, for tiles of `side` pixels."""
        del side
        return {"image_aspect_ratio": self.name, "mm_patch_merge_type": self.merge}

    def hf_keys(self, config: ImageConfig) -> dict[str, object]:
        """Return the further keys of config.json in Hugging Face's layout."""
        del config
        return {}

    def hf_preprocessor(self, config: ImageConfig) -> dict[str, object]:
        """Return the further keys of preprocessor_config.json in Hugging Face's layout."""
        del config
        return {}
