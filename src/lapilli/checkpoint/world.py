"""What a narrow model knows: a checkpoint may say which pictures it was made for.

    world.json          {"knows": a sentence, "limit": a number}
    world.safetensors   mean [D] and whitening [D, D] of known pictures (means of their features)

A picture that lies further from those than `limit` is outside of its world. Checkpoints
without these files claim nothing. Knows features; no pictures and no prompts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lapilli.errors import CheckpointError
from lapilli.shapes import Float, Tensor

# Keeps directions in which the known features hardly vary from deciding alone.
RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class World:
    """Known pictures as one gaussian, and how far from it is too far.

    Attributes:
        knows: one sentence for people.
        limit: the largest distance of a known picture.
        mean: of the pictures, each the mean of its positions, [D].
        whitening: turns differences from the mean into a unit gaussian, [D, D].
    """

    knows: str
    limit: float
    mean: Float[Tensor, " D"]
    whitening: Float[Tensor, "D D"]

    def distance(self, features: Float[Tensor, "n D"]) -> float:
        """Squared Mahalanobis distance per dimension, 1 for an average known picture."""
        whitened = (features.float().cpu().mean(dim=0) - self.mean) @ self.whitening
        return float(whitened.square().mean())

    def contains(self, features: Float[Tensor, "n D"]) -> bool:
        """Whether these are features of a picture that the model was made for."""
        return self.distance(features) <= self.limit


def measure_world(
    known: Sequence[Float[Tensor, "n D"]], *, knows: str, share: float = 0.999
) -> World:
    """The world of these pictures, drawn so that `share` of them lies inside.

    Source: the Mahalanobis detector of Lee et al. 2018 (arXiv 1807.03888), with one class.
    """
    pictures = torch.stack([item.double().mean(dim=0) for item in known])
    mean = pictures.mean(dim=0)
    covariance = torch.cov(pictures.T)
    values, vectors = torch.linalg.eigh(covariance)
    whitening = vectors / (values + RIDGE * values.mean()).sqrt()
    world = World(knows, 0.0, mean.float(), whitening.float())
    distances = torch.tensor([world.distance(item) for item in known])
    return World(knows, float(distances.quantile(share)), world.mean, world.whitening)


def save_world(world: World, folder: Path) -> None:
    """Write the two files beside a checkpoint."""
    said = {"knows": world.knows, "limit": world.limit}
    (folder / "world.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    tensors = {"mean": world.mean.contiguous(), "whitening": world.whitening.contiguous()}
    save_file(tensors, folder / "world.safetensors")


def load_world(folder: Path) -> World | None:
    """The world of a checkpoint, or None when it claims none.

    Raises:
        CheckpointError: one of the two files is there and not usable.
    """
    path = folder / "world.json"
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(folder / "world.safetensors")
        return World(
            str(said["knows"]), float(said["limit"]), tensors["mean"], tensors["whitening"]
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} and world.safetensors beside it do not describe a world: {error!r}; "
            "delete both to load the checkpoint without"
        ) from error
