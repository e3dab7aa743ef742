"""Geometry of feature maps (llava.model.llava_arch)."""

from collections.abc import Sequence

from lapilli.compat.preparation import LlavaMetaForCausalLM
from lapilli.geometry import Grid, ImageSize, unpad_margins
from lapilli.shapes import Float, Tensor

__all__ = ["LlavaMetaForCausalLM", "unpad_image"]


def unpad_image(
    tensor: Float[Tensor, "D H W"], original_size: Sequence[int]
) -> Float[Tensor, "D h w"]:
    """A feature map without what shows padding (quirk 18).

    Args:
        tensor: features, channels first.
        original_size: (width, height) of the picture.
    """
    height, width = tensor.shape[1:]
    size = ImageSize(original_size[1], original_size[0])
    margins = unpad_margins(size, Grid(height, width))
    return tensor[
        :, margins.rows : height - margins.rows, margins.columns : width - margins.columns
    ]
