"""Ops about pixels: process_images, pixels, conv_process_image, geometry."""

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.conformance.cases import Case
from tests.conformance.checkpoints import Workshop
from tests.conformance.compare import Check

PNG_ATOL = 1e-5
# Of a .jpg, 1 % of the values may be 3 levels off: decoders differ. One level is 0.0150.
JPEG_ATOL, JPEG_OUTLIERS = 1e-5, 0.01
JPEG_LEVELS = 3 * 0.0150
STATISTICS_ATOL = 2e-6  # means and deviations are stored with 7 decimals


def compare_pixels(
    check: Check, found: Any, case: Case, expect: dict[str, Any], *, jpeg: bool
) -> None:
    """An answer of process_images against container, shapes, statistics, corners, 9 x 9 grid."""
    check.equal("container", "tensor" if torch.is_tensor(found) else "list", expect["container"])
    shape = list(found.shape) if torch.is_tensor(found) else [list(x.shape) for x in found]
    if not check.equal("shape", shape, expect["shape"]):
        return
    check.equal("dtype", str(found[0].dtype), expect["dtype"])
    images = [image if image.ndim == 4 else image[None] for image in found]
    compare = _jpeg if jpeg else _exactly
    for i, (image, expected) in enumerate(zip(images, expect["images"], strict=True)):
        check.equal(f"tiles of image {i}", len(image), expected["tiles"])
        flat = image.double().reshape(len(image), -1)
        atol = JPEG_LEVELS if jpeg else STATISTICS_ATOL
        check.close("mean", flat.mean(1), expected["mean"], atol=atol)
        check.close("std", flat.std(1, unbiased=False), expected["std"], atol=atol)
        corners = image[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(len(image), -1)
        compare(check, "corners", corners, expected["corners"])
    if "pixels/grid9" in case.arrays:
        tiles = torch.cat(images)
        size = tiles.shape[-1]
        at = torch.from_numpy(np.round(np.linspace(0, size - 1, 9)).astype(np.int64))
        compare(check, "grid9", tiles[:, :, at][..., at], case.arrays["pixels/grid9"])


def _exactly(check: Check, what: str, found: Any, expected: Any) -> None:
    check.close(what, found, expected, atol=PNG_ATOL)


def _jpeg(check: Check, what: str, found: Any, expected: Any) -> None:
    if check.mostly_close(what, found, expected, atol=JPEG_ATOL, outliers=JPEG_OUTLIERS):
        check.close(what, found, expected, atol=JPEG_LEVELS)


def picture_processor(crop: int) -> Any:
    """The image processor of a CLIP tower of `crop` pixels."""
    from lapilli.compat.tower import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": crop}, crop_size={"height": crop, "width": crop}
    )


def process_images(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.mm_utils import process_images as ours

    given = case.given
    images = workshop.pictures(given["images"], convert=given.get("convert", True))
    config = SimpleNamespace()
    if given["aspect"] != "absent":
        config.image_aspect_ratio = given["aspect"]
    if "pinpoints" in given:
        config.image_grid_pinpoints = given["pinpoints"]
    processor = picture_processor(given["crop"])
    if case.raises:
        check.raises(case.raises, lambda: ours(images, processor, config))
        return
    jpeg = any(name.endswith(".jpg") for name in given["images"])
    found = ours(images, processor, config)
    compare_pixels(check, found, case, case.expect, jpeg=jpeg)
    check.equal("sizes", [image.size for image in images], case.expect["sizes"])
    check.equal("modes", [image.mode for image in images], case.expect["modes"])
    if "u8" in case.arrays:
        check.equal("u8", levels(found, processor), case.arrays["u8"])


def levels(pixels: Any, processor: Any) -> np.ndarray:
    """8-bit levels [tiles, 3, H, W] before rescaling and normalization."""
    tiles = torch.cat([image if image.ndim == 4 else image[None] for image in pixels]).double()
    mean = torch.tensor(processor.image_mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(processor.image_std, dtype=torch.float64).view(3, 1, 1)
    return ((tiles * std + mean) * 255).round().to(torch.uint8).numpy()


def pixels(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.mm_utils import process_images as ours

    from tests.conformance.ops.vision import loaded

    model = loaded(workshop)
    images = workshop.pictures(case.given["images"])
    if case.raises:
        check.raises(case.raises, lambda: ours(images, model.processor, model.model.config))
        return
    found = ours(images, model.processor, model.model.config)
    jpeg = any(name.endswith(".jpg") for name in case.given["images"])
    compare_pixels(check, found, case, case.expect, jpeg=jpeg)
    check.equal("image_sizes", [image.size for image in images], case.expect["image_sizes"])


def conv_process_image(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.conversation import default_conversation

    image = workshop.picture(case.given["image"], convert=False)
    kwargs = {"return_pil": True, **case.given.get("kwargs", {})}

    def found() -> Image.Image:
        return default_conversation.process_image(image, case.given["mode"], **kwargs)

    if case.raises:
        check.raises(case.raises, found)
        return
    result = found()
    check.equal("size", list(result.size), case.expect["size"])
    check.equal("mode", result.mode, case.expect["mode"])
    values = np.asarray(result, dtype=np.float64)
    if case.given["image"].endswith(".jpg"):
        check.close("mean", values.mean(), case.expect["mean"], atol=0.1)
        return
    check.close("mean", values.mean(), case.expect["mean"], atol=1e-6)
    corners = np.asarray(result)[[0, 0, -1, -1], [0, -1, 0, -1]].reshape(-1)
    check.equal("corners", corners, case.expect["corners"])
    digest = hashlib.sha256(result.tobytes()).hexdigest()
    check.equal("sha256", digest, case.expect["sha256"])


def geometry(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.mm_utils import (
        get_anyres_image_grid_shape,
        resize_and_pad_image,
        select_best_resolution,
    )
    from llava.model.llava_arch import unpad_image

    pinpoints, tile = case.given["pinpoints"], case.given["tile"]
    listed = [tuple(p) for p in _listed(pinpoints)]
    side = tile // 14
    for size, row in zip(case.given["sizes"], case.expect["rows"], strict=True):
        size = tuple(size)
        best = select_best_resolution(size, listed)
        grid = get_anyres_image_grid_shape(size, pinpoints, tile)
        feature_map = torch.zeros(1, grid[1] * side, grid[0] * side)
        unpadded = unpad_image(feature_map, size)
        white = resize_and_pad_image(Image.new("RGB", size, (255, 255, 255)), best)
        height, width = unpadded.shape[1:]
        found = {
            "size": size,
            "best": best,
            "grid": grid,
            "unpadded_hw": [height, width],
            "n_features": height * (width + 1),
            "pasted_bbox": white.getbbox(),
        }
        check.equal(f"size {size}", found, row)


def _listed(pinpoints: Any) -> list[list[int]]:
    import ast

    return ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
