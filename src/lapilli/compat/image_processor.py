"""The CLIP image processor of transformers that works with Pillow, as the original's pixels do."""

# The types of transformers differ from release to release, and no release has all of them.
# mypy: allow-untyped-calls, allow-subclassing-any, disable-error-code="override,misc,assignment"

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from lapilli.checkpoint.write.llava import write_preprocessor_config
from lapilli.config.model import PixelConfig
from lapilli.errors import MediaError
from lapilli.modality.image.decode import as_rgb

try:  # transformers calls it by another name since it has one for torchvision as well
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Base
except ImportError:
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor as Base


class CLIPImageProcessor(Base):
    """Resizes, crops and normalises one tile per picture; its options are those of transformers."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        # As programs for the original read them, and as its preprocessor_config.json has them.
        for name in ("size", "crop_size"):
            sizes = dict(getattr(self, name))
            setattr(self, name, {key: value for key, value in sizes.items() if value is not None})
        self.image_mean, self.image_std = list(self.image_mean), list(self.image_std)

    @classmethod
    def of(cls, pixels: PixelConfig) -> "CLIPImageProcessor":
        """Return the processor of a vision tower that lapilli has read."""
        written = write_preprocessor_config(pixels)
        written.pop("image_processor_type")
        return cls(**written)

    def preprocess(self, images: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        """Return `pixel_values` of one picture or of a list of them.

        Raises:
            MediaError: no pictures, or one that the original cannot read either (quirk 15).
        """
        listed = list(images) if isinstance(images, Sequence) else [images]
        if not listed:
            raise MediaError("no pictures to preprocess: the list is empty")
        shown = [_as_it_is_seen(one) for one in listed]
        return super().preprocess(shown, *args, **options)


def _as_it_is_seen(image: Any) -> Any:  # noqa: ANN401
    """Return the picture that the original's processor works on.

    Note: later releases lay a transparent picture on white, the original drops the transparency.
        Quirk 15: the processor takes an array whose first axis is 1 or 3 for channel-first, so a
        picture 3 pixels high is scrambled and one 1 pixel high has one channel and is refused.
    """
    if not isinstance(image, Image.Image):
        return image
    image = as_rgb(image)
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]
    if image.height not in (1, 3):
        return image
    if image.height == 1:
        raise MediaError(
            f"a picture of {image.width}x1 pixels: the original takes its only row for its only "
            "channel and fails; lapilli's own API reads it"
        )
    values = np.asarray(image).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(values))
