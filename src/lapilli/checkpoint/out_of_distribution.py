"""Out-of-distribution detector of a checkpoint, by the vision features of its training pictures.

    world.json          {"knows": a sentence, "limit": a number, "without_picture": a sentence}
    world.safetensors   mean [E] and whitening [E, E] of the features of known pictures

A picture whose features are further from those than `limit` is out of distribution. A question
without any picture is answered with `without_picture`, if the model was trained on none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file

from lapilli.checkpoint.formats.files import read_optional_json
from lapilli.checkpoint.formats.weights import check_values, open_shard
from lapilli.config.reader import JsonObject, KeyReader
from lapilli.errors import CheckpointError
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.pixels import PreparedImage
from lapilli.model.vlm import VisionLanguageModel
from lapilli.shapes import Float, Tensor

# Share of the mean variance that is added, so that directions of little variance do not dominate.
RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class Detector:
    """Gaussian of the features of known pictures, with a limit on the distance.

    Attributes:
        knows: a sentence about the known pictures, for users.
        limit: the largest distance of a known picture.
        mean: of the pictures, each the mean of its patches, [E].
        whitening: maps differences from the mean to a unit gaussian, [E, E].
        without_picture: the answer to a question without a picture; "": the model's own.
    """

    knows: str
    limit: float
    mean: Float[Tensor, " E"]
    whitening: Float[Tensor, "E E"]
    without_picture: str = ""

    def distance(self, features: Float[Tensor, "n E"]) -> float:
        """Return the squared Mahalanobis distance per dimension, 1 for an average known picture."""
        whitened = (features.float().cpu().mean(dim=0) - self.mean) @ self.whitening
        return float(whitened.square().mean())

    def is_known(self, features: Float[Tensor, "n E"]) -> bool:
        """Return whether a picture with these features is in distribution."""
        return self.distance(features) <= self.limit

    @torch.inference_mode()
    def is_unknown(self, item: object, model: VisionLanguageModel) -> bool:
        """Return whether a prepared item is a picture out of distribution; features never are."""
        if not isinstance(item, PreparedImage):
            return False
        modality = cast("ImageModality", model.modality("image"))
        return not self.is_known(modality.tower_features(item.pixel_values).flatten(0, 1))

    def warning(self, name: str) -> str:
        """Return a warning of one line about such a picture; `name`: of the model."""
        return (
            f"this picture is unlike those that {name} was made for: {self.knows} "
            "Load a LLaVA checkpoint for others, for instance llava-hf/llava-1.5-7b-hf."
        )


def fit_detector(
    known: Sequence[Float[Tensor, "n E"]],
    *,
    knows: str,
    share: float = 0.995,
    without_picture: str = "",
) -> Detector:
    """Fit a detector for which about `share` of pictures like these are in distribution.

    The gaussian is fitted to every second picture and the limit taken from the others, because
    the pictures of the fit are nearer to it than fresh ones.

    Source: the Mahalanobis detector of Lee et al. 2018 (arXiv 1807.03888), with one class. The
    features are the tower's: a projector keeps only what its language model needs to tell apart.
    """
    pictures = torch.stack([item.double().mean(dim=0) for item in known[::2]])
    mean = pictures.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(pictures.T))
    whitening = vectors / (values + RIDGE * values.mean()).sqrt()
    detector = Detector(knows, 0.0, mean.float(), whitening.float().contiguous())
    distances = torch.tensor([detector.distance(item) for item in known[1::2]])
    limit = float(distances.quantile(share))
    return replace(detector, limit=limit, without_picture=without_picture)


def save_detector(detector: Detector, folder: Path) -> None:
    """Write the two files beside a checkpoint."""
    said: dict[str, str | float] = {"knows": detector.knows, "limit": detector.limit}
    if detector.without_picture:
        said["without_picture"] = detector.without_picture
    (folder / "world.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    tensors = {"mean": detector.mean, "whitening": detector.whitening}
    save_file(tensors, folder / "world.safetensors")


def detector_files(folder: Path) -> dict[str, bytes]:
    """Read the two files of a checkpoint, for a copy with the same tower: contents by name."""
    paths = [folder / name for name in ("world.json", "world.safetensors")]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def load_detector(folder: Path, *, width: int | None = None) -> Detector | None:
    """Load the detector of a checkpoint, or return None where it has none.

    Args:
        folder: of the checkpoint.
        width: of the tower's features, E; None: any.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = folder / "world.json"
    try:
        said = read_optional_json(path)
        return None if said is None else _detector(said, folder / "world.safetensors", width)
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(
            f"{path} and world.safetensors beside it are no out-of-distribution detector: "
            f"{error!s}; delete both to load the checkpoint without"
        ) from error


def _detector(said: JsonObject, file: Path, width: int | None) -> Detector:
    reader = KeyReader(said, "world.json")
    limit = reader.optional_number("limit", least=0.0)
    if limit is None:
        raise CheckpointError("world.json: limit is missing")
    shard = open_shard(file)
    mean, whitening = (shard.tensor(name, torch.float32) for name in ("mean", "whitening"))
    size = len(mean) if width is None and mean.dim() == 1 else width
    if mean.shape != (size,) or whitening.shape != (size, size):
        raise CheckpointError(
            f"mean has shape {tuple(mean.shape)} and whitening {tuple(whitening.shape)}, expected "
            f"({size},) and ({size}, {size})"
        )
    check_values("mean", mean)
    check_values("whitening", whitening)
    knows, without = (reader.text(key, "") or "" for key in ("knows", "without_picture"))
    return Detector(knows, limit, mean, whitening, without)
