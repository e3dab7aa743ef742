"""Where pebble's world ends: what the exported tower sees in fresh scenes.

Knows scenes and the exported files; a detector is fitted and kept by
lapilli.checkpoint.out_of_distribution.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final, cast

import torch
from PIL import Image

from lapilli.checkpoint.out_of_distribution import Detector, fit_detector
from lapilli.modality.image.image import ImageModality
from lapilli.pipeline import load
from lapilli.shapes import Float, Tensor
from pebble.blind import NEEDS_PICTURE
from pebble.draw import draw
from pebble.outside import outside_picture
from pebble.typed import wide_scene

KNOWS: Final = (
    "it knows drawings of one to five shapes, short words, numbers up to 99 and handwritten digits."
)
_FIRST_SCENE: Final = 800_000_000  # between the pools' seeds and the exam's
# Less probable than that are four in five wrong readings of small numbers and half of the wrong
# answers of the first exam, but also one in three right readings of small numbers, and two in a
# hundred right answers of the first exam.
_UNSURE_BELOW: Final = 0.7


def pebble_detector(folder: Path, *, num_scenes: int = 6000) -> Detector:
    """Fit the detector of an exported pebble, from scenes that it was not trained on.

    Type and drawings are two classes: one gaussian around both would reach far between them.
    """
    scenes = [wide_scene(seed) for seed in range(_FIRST_SCENE, _FIRST_SCENE + num_scenes)]
    return fit_detector(
        features_of(folder, (draw(scene) for scene in scenes)),
        knows=KNOWS,
        classes=[int(scene.writing is not None) for scene in scenes],
        without_picture=NEEDS_PICTURE,
        unsure_below=_UNSURE_BELOW,
    )


def boundary_rates(
    folder: Path, detector: Detector, *, num_pictures: int = 500
) -> tuple[float, float]:
    """Share of fresh scenes taken for known, and share of other pictures told apart."""
    first = _FIRST_SCENE + 50_000_000
    known = features_of(
        folder, (draw(wide_scene(seed)) for seed in range(first, first + num_pictures))
    )
    other = features_of(folder, (outside_picture(seed) for seed in range(num_pictures)))
    return (
        sum(detector.is_known(item) for item in known) / num_pictures,
        sum(not detector.is_known(item) for item in other) / num_pictures,
    )


def features_of(folder: Path, pictures: Iterable[Image.Image]) -> list[Float[Tensor, "n E"]]:
    """Features of every picture, as the tower gives them to the projector."""
    model = load(str(folder), device="cpu", dtype="float32").model
    modality = cast("ImageModality", model.modality("image"))
    with torch.inference_mode():
        return [
            modality.tower_features(modality.prepare(picture).pixel_values).flatten(0, 1)
            for picture in pictures
        ]
