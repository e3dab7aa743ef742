"""Square: the middle of the picture, as config.json means it where it names no mode."""

from collections.abc import Mapping
from typing import ClassVar

from PIL import Image

from lapilli.config.model import ImageConfig, Merge
from lapilli.modality.image.modes.base import ImageMode


class Square(ImageMode):
    """The shorter side brought to the tower's size, the rest cut off."""

    name = "square"
    hf_types: ClassVar[Mapping[Merge, str]] = {"flat": "llava"}

    def cut(self, image: Image.Image, config: ImageConfig) -> list[Image.Image]:
        """Return the picture: every tile is resized and cropped so."""
        del config
        return [image]


MODE = Square()
