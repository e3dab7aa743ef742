"""Out-of-distribution detector of a checkpoint, by the vision features of its training pictures.

    world.json          {"knows": a sentence, "limit": a number, "without_picture": a sentence,
                         "unsure_below": a probability}
    world.safetensors   mean [C, E] and whitening [C, E, E] of C classes of known pictures, as the
                        tower sees them; [E] and [E, E] are one class

A picture whose features lie further than `limit` from every class is out of distribution. A
question without any picture is answered with `without_picture`, where a model was trained on none.
An answer whose tokens together are less probable than `unsure_below` is one to doubt.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from lapilli.checkpoint.formats.weights import check_values, open_shard
from lapilli.checkpoint.source import read_optional_json
from lapilli.checkpoint.write.files import write_safetensors
from lapilli.config.reader import JsonObject, KeyReader
from lapilli.errors import CheckpointError
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.pixels import PreparedImage
from lapilli.model import VisionLanguageModel
from lapilli.shapes import Float, Tensor

# Share of the mean variance that is added, so that directions of little variance do not dominate.
RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class Detector:
    """Gaussians of the features of known pictures, one per class, with a limit on the distance.

    Attributes:
        knows: a sentence about the known pictures, for users.
        limit: the largest distance of a known picture.
        mean: of the pictures of each class, each the mean of its patches, [C, E].
        whitening: turns differences from the mean into a unit gaussian, [C, E, E].
        without_picture: the answer to a question without a picture; "": the model's own.
        unsure_below: the probability under which an answer is one to doubt; 0: none is.
    """

    knows: str
    limit: float
    mean: Float[Tensor, "C E"]
    whitening: Float[Tensor, "C E E"]
    without_picture: str = ""
    unsure_below: float = 0.0

    def distance(self, features: Float[Tensor, "n E"]) -> float:
        """Return the squared Mahalanobis distance from the nearest class, per dimension.

        An average picture of a class is at 1 from it.
        """
        difference = features.float().cpu().mean(dim=0) - self.mean
        whitened = torch.einsum("ce,cef->cf", difference, self.whitening)
        return float(whitened.square().mean(dim=-1).min())

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

    def doubt(self, probability: float, name: str) -> str | None:
        """Return one line for people about an answer that may well be wrong, or None.

        `probability` is that of all tokens of the answer together.
        """
        if probability >= self.unsure_below:
            return None
        return f"{name} is not sure of this answer: it gave it a probability of {probability:.0%}."


def fit_detector(
    known: Sequence[Float[Tensor, "n E"]],
    *,
    knows: str,
    classes: Sequence[int] | None = None,
    share: float = 0.995,
    without_picture: str = "",
    unsure_below: float = 0.0,
) -> Detector:
    """Fit a detector for which about `share` of pictures like these are in distribution.

    The gaussians are fitted to every second picture and the limit taken from the others, because
    the pictures of the fit lie nearer to them than fresh ones do.

    Source: the Mahalanobis detector of Lee et al. 2018 (arXiv 1807.03888), with a covariance for
    each class. The features are the tower's: a projector keeps only what its language model needs
    to tell apart.

    Args:
        known: features of each picture.
        knows: one sentence for people.
        classes: the class of each picture, 0 to C - 1; None: all are of one. A class has to have
            more pictures than features have dimensions for its covariance to mean much.
        share: of known pictures that are taken for known.
        without_picture: see `Detector`.
        unsure_below: see `Detector`.
    """
    pictures = torch.stack([item.double().mean(dim=0) for item in known[::2]])
    members = torch.tensor([0] * len(known) if classes is None else list(classes))[::2]
    fits = [_gaussian(pictures[members == kind]) for kind in sorted(set(members.tolist()))]
    mean, whitening = (torch.stack(parts).float() for parts in zip(*fits, strict=True))
    detector = Detector(knows, 0.0, mean, whitening, without_picture, unsure_below)
    distances = torch.tensor([detector.distance(item) for item in known[1::2]])
    return replace(detector, limit=float(distances.quantile(share)))


def _gaussian(pictures: Float[Tensor, "N E"]) -> tuple[Float[Tensor, " E"], Float[Tensor, "E E"]]:
    """Return mean and whitening of pictures."""
    values, vectors = torch.linalg.eigh(torch.cov(pictures.T))
    return pictures.mean(dim=0), vectors / (values + RIDGE * values.mean()).sqrt()


def save_detector(detector: Detector, folder: Path) -> None:
    """Write the two files beside a checkpoint."""
    said: dict[str, str | float] = {"knows": detector.knows, "limit": detector.limit}
    if detector.without_picture:
        said["without_picture"] = detector.without_picture
    if detector.unsure_below:
        said["unsure_below"] = detector.unsure_below
    (folder / "world.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    tensors = {"mean": detector.mean, "whitening": detector.whitening}
    write_safetensors(folder / "world.safetensors", tensors)


def detector_files(folder: Path) -> dict[str, bytes]:
    """Read the two files of a checkpoint, for a copy with the same tower: contents by name."""
    paths = [folder / name for name in ("world.json", "world.safetensors")]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def load_detector(folder: Path, *, width: int | None = None) -> Detector | None:
    """Load the detector of a checkpoint, or return None where it has none.

    `width` is that of the tower's features, E; None: any.

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
    if mean.dim() == 1:
        mean, whitening = mean[None], whitening[None]
    size = mean.shape[-1] if width is None else width
    if mean.shape[1:] != (size,) or whitening.shape != (len(mean), size, size) or not len(mean):
        raise CheckpointError(
            f"mean has shape {tuple(mean.shape)} and whitening {tuple(whitening.shape)}, expected "
            f"(classes, {size}) and (classes, {size}, {size})"
        )
    check_values("mean", mean)
    check_values("whitening", whitening)
    knows, without = (reader.text(key, "") for key in ("knows", "without_picture"))
    unsure = reader.optional_number("unsure_below", least=0.0, most=1.0) or 0.0
    return Detector(knows, limit, mean, whitening, without, unsure)
