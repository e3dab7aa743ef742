"""Pad: the whole picture in a square of the mean colour, as LLaVA 1.5 sees it."""

import math
from collections.abc import Mapping
from typing import ClassVar

from PIL import Image

from lapilli.config.model import ImageConfig, Merge
from lapilli.modality.image import pixels
from lapilli.modality.image.modes.base import ImageMode


class Pad(ImageMode):
    """The picture in the middle of a square, which `lapilli build` chooses for a new model."""

    name = "pad"
    hf_types: ClassVar[Mapping[Merge, str]] = {"flat": "llava"}

    def cut(self, image: Image.Image, config: ImageConfig) -> list[Image.Image]:
        """Return the padded picture.

        Note: differs from the original where a side is longer than 11585 pixels, whose square
            would not fit into `pixels.MAX_INTERMEDIATE_PIXELS`.
        """
        longer, most = max(image.size), pixels.MAX_INTERMEDIATE_PIXELS
        if longer * longer > most:
            scale = math.isqrt(most) / 4 / longer  # exactness is lost: be quick
            smaller = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
            image = image.resize(smaller, Image.Resampling(config.pixels.resample))
        mean = tuple(int(channel * 255) for channel in config.pixels.mean)
        return [pixels.pad_to_square(image, mean)]

    def hf_preprocessor(self, config: ImageConfig) -> dict[str, object]:
        """Return the processor that pads."""
        del config
        return {"image_processor_type": "LlavaImageProcessor", "do_pad": True}


MODE = Pad()
