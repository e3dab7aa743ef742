"""Whole-picture changes of shape: a padded square, a fitted resolution, the chat's image modes.

Works on Pillow images of any mode and leaves the mode as it is.
"""

from PIL import Image

from lapilli.errors import MediaError
from lapilli.geometry import ImageSize, fit_within
from lapilli.modality.image.decode import check_bytes

CHAT_BACKGROUND = (122, 116, 104)  # the CLIP mean in 8 bits
CHAT_RESIZED = (336, 336)


def size_of(image: Image.Image) -> ImageSize:
    """Height and width of a Pillow image."""
    return ImageSize(image.height, image.width)


def pad_to_square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square; a square picture comes back as it is.

    Raises:
        MediaError: the square would take too much memory.
        TypeError: the image's mode cannot hold a background of that many channels (Pillow).

    Source: LLaVA mm_utils.py, expand2square.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    check_bytes(4 * side * side, f"the picture ({size_of(image)})", f"a square of {side}x{side}")
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def fit_and_pad(image: Image.Image, target: ImageSize, resample: Image.Resampling) -> Image.Image:
    """The picture as large as it fits into `target`, in the middle of black.

    Source: LLaVA mm_utils.py, resize_and_pad_image.
    """
    inner = fit_within(size_of(image), target)
    canvas = Image.new("RGB", (target.width, target.height), (0, 0, 0))
    resized = image.resize((inner.width, inner.height), resample)
    canvas.paste(resized, ((target.width - inner.width) // 2, (target.height - inner.height) // 2))
    return canvas


def apply_chat_mode(
    image: Image.Image, mode: str, *, max_len: int = 1344, min_len: int = 672
) -> Image.Image:
    """The picture as the original's chat window would send it.

    Args:
        image: any Pillow image.
        mode: "Pad" (to a square), "Resize" (to 336x336), "Default" or "Crop" (left alone).
        max_len: a longer side than this is brought down, in pixels.
        min_len: upper bound of the shorter side when that happens, in pixels.

    Raises:
        MediaError: an unknown mode.

    Source: LLaVA conversation.py, Conversation.process_image.
    """
    if mode == "Pad":
        image = pad_to_square(image, CHAT_BACKGROUND)
    elif mode == "Resize":
        image = image.resize(CHAT_RESIZED)
    elif mode not in ("Default", "Crop"):
        raise MediaError(f"unknown image mode {mode!r}: use Pad, Resize, Crop or Default")
    longer, shorter = max(image.size), min(image.size)
    if longer <= max_len:
        return image
    ratio = longer / shorter
    short = int(min(max_len / ratio, min_len, shorter))
    long = int(short * ratio)
    return image.resize((short, long) if image.height > image.width else (long, short))
