"""Our pixel arithmetic with the attributes and return values of a CLIPImageProcessor; no model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lapilli.compat.foreign import Foreign
from lapilli.config.model import ImageConfig, PixelConfig
from lapilli.errors import MediaError
from lapilli.geometry import ImageSize
from lapilli.modality.image.decode import as_rgb
from lapilli.modality.image.pixels import prepare


class BatchFeature(dict[str, Any]):
    """A dictionary whose entries are attributes too, as image processors return it."""

    def __getattr__(self, name: str) -> Foreign:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, *args: Foreign, **kwargs: Foreign) -> "BatchFeature":
        """The same with every tensor moved or cast."""
        moved = {k: v.to(*args, **kwargs) if torch.is_tensor(v) else v for k, v in self.items()}
        return BatchFeature(moved)


class CLIPImageProcessor:
    """Resizes, crops and normalises one tile per picture.

    Args:
        pixels: the arithmetic; the keyword arguments change single values of it.
        size: {"shortest_edge": n} or {"height": h, "width": w}.
        crop_size: {"height": h, "width": w}.
    """

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        pixels: PixelConfig | None = None,
        *,
        size: Mapping[str, int] | None = None,
        crop_size: Mapping[str, int] | None = None,
    ) -> None:
        self.pixels = pixels or _from_sizes(size, crop_size)

    @property
    def crop_size(self) -> dict[str, int]:
        """Height and width of a tile."""
        return dict(self.pixels.crop_size._asdict())

    @property
    def size(self) -> dict[str, int]:
        """What pictures are resized to."""
        if self.pixels.resize_to is not None:
            return dict(self.pixels.resize_to._asdict())
        return {"shortest_edge": self.pixels.shortest_edge or self.pixels.crop_size.height}

    @property
    def image_mean(self) -> list[float]:
        """Mean of each channel, for values from 0 to 1."""
        return list(self.pixels.mean)

    @property
    def image_std(self) -> list[float]:
        """Deviation of each channel."""
        return list(self.pixels.std)

    @property
    def resample(self) -> int:
        """Pillow's number of the resampling filter."""
        return self.pixels.resample

    def __getattr__(self, name: str) -> Foreign:
        if name == "pixels" or not hasattr(self.pixels, name):
            raise AttributeError(f"CLIPImageProcessor has no {name}")
        return getattr(self.pixels, name)

    def preprocess(
        self,
        images: Foreign,
        return_tensors: str | None = None,
        **_options: object,
    ) -> BatchFeature:
        """`pixel_values` of one picture or of a list of them.

        Args:
            images: Pillow images or arrays [H, W, 3].
            return_tensors: "pt": one tensor [N, 3, H, W]; None: a list of arrays.

        Raises:
            MediaError: no pictures, or one that the original cannot read either (quirk 15).
        """
        listed = list(images) if isinstance(images, Sequence) else [images]
        if not listed:
            raise MediaError("no pictures to preprocess: the list is empty")
        config = ImageConfig(pixels=self.pixels)
        tiles = [prepare(as_the_processor_sees(i), config).pixel_values for i in listed]
        if return_tensors == "pt":
            return BatchFeature(pixel_values=torch.cat(tiles))
        return BatchFeature(pixel_values=[tile[0].numpy() for tile in tiles])

    __call__ = preprocess


def _from_sizes(size: Mapping[str, int] | None, crop_size: Mapping[str, int] | None) -> PixelConfig:
    crop = crop_size or {"height": 224, "width": 224}
    cropped = ImageSize(crop["height"], crop["width"])
    if size is not None and "height" in size:
        return PixelConfig(crop_size=cropped, resize_to=ImageSize(size["height"], size["width"]))
    edge = size["shortest_edge"] if size is not None else cropped.height
    return PixelConfig(crop_size=cropped, shortest_edge=edge)


def as_the_processor_sees(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    """The picture that the original's processor works on.

    Note: quirk 15. The processor takes an array whose first axis is 1 or 3 for channel-first, so a
        picture 3 pixels high is scrambled and one 1 pixel high has one channel and is refused.

    Raises:
        MediaError: a picture 1 pixel high.
    """
    rgb = as_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
    if rgb.height == 3:
        values = np.asarray(rgb).transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(values))
    if rgb.height == 1:
        raise MediaError(
            f"a picture of {rgb.width}x1 pixels: the original takes its only row for its only "
            "channel and fails; lapilli's own API reads it"
        )
    return rgb
