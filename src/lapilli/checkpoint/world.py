"""What a narrow model knows: a checkpoint may say which pictures it was made for.

    world.json          {"knows": a sentence, "limit": a number, "without_picture": a sentence}
    world.safetensors   mean [E] and whitening [E, E] of known pictures, as the tower sees them

A picture that lies further from those than `limit` is outside of its world. A question without
any picture is answered with `without_picture`, where a model was trained on none. Checkpoints
without these files claim nothing. Knows features; no pictures and no prompts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from lapilli.checkpoint.files import read_optional_json
from lapilli.checkpoint.weights import open_shard, refuse_not_finite
from lapilli.config.reader import JsonObject, KeyReader
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
        mean: of the pictures, each the mean of its patches, [E].
        whitening: turns differences from the mean into a unit gaussian, [E, E].
        without_picture: the answer to a question without a picture; "": the model's own.
    """

    knows: str
    limit: float
    mean: Float[Tensor, " E"]
    whitening: Float[Tensor, "E E"]
    without_picture: str = ""

    def distance(self, features: Float[Tensor, "n E"]) -> float:
        """Squared Mahalanobis distance per dimension, 1 for an average known picture."""
        whitened = (features.float().cpu().mean(dim=0) - self.mean) @ self.whitening
        return float(whitened.square().mean())

    def contains(self, features: Float[Tensor, "n E"]) -> bool:
        """Whether these are features of a picture that the model was made for."""
        return self.distance(features) <= self.limit


def measure_world(
    known: Sequence[Float[Tensor, "n E"]],
    *,
    knows: str,
    share: float = 0.995,
    without_picture: str = "",
) -> World:
    """The world of these pictures, drawn so that about `share` of such pictures lies inside.

    The gaussian is fitted to every second picture and the limit taken from the others, because
    the pictures of the fit lie nearer to it than fresh ones do.

    Source: the Mahalanobis detector of Lee et al. 2018 (arXiv 1807.03888), with one class. The
    features are the tower's: a projector keeps only what its language model needs to tell apart.
    """
    pictures = torch.stack([item.double().mean(dim=0) for item in known[::2]])
    mean = pictures.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(pictures.T))
    whitening = vectors / (values + RIDGE * values.mean()).sqrt()
    world = World(knows, 0.0, mean.float(), whitening.float().contiguous())
    distances = torch.tensor([world.distance(item) for item in known[1::2]])
    limit = float(distances.quantile(share))
    return replace(world, limit=limit, without_picture=without_picture)


def save_world(world: World, folder: Path) -> None:
    """Write the two files beside a checkpoint."""
    said: dict[str, str | float] = {"knows": world.knows, "limit": world.limit}
    if world.without_picture:
        said["without_picture"] = world.without_picture
    (folder / "world.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    tensors = {"mean": world.mean, "whitening": world.whitening}
    save_file(tensors, folder / "world.safetensors")


def world_files(folder: Path) -> dict[str, bytes]:
    """The two files of a checkpoint, for a copy with the same tower: contents by name."""
    paths = [folder / name for name in ("world.json", "world.safetensors")]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def load_world(folder: Path, *, width: int | None = None) -> World | None:
    """The world of a checkpoint, or None when it claims none.

    Args:
        folder: of the checkpoint.
        width: of the tower's features, E; None: whatever the files say.

    Raises:
        CheckpointError: one of the two files is there and not usable.
    """
    path = folder / "world.json"
    try:
        said = read_optional_json(path)
        return None if said is None else _world(said, folder / "world.safetensors", width)
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(
            f"{path} and world.safetensors beside it do not describe a world: {error!s}; "
            "delete both to load the checkpoint without"
        ) from error


def _world(said: JsonObject, file: Path, width: int | None) -> World:
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
    refuse_not_finite("mean", mean)
    refuse_not_finite("whitening", whitening)
    knows, without = (reader.text(key, "") or "" for key in ("knows", "without_picture"))
    return World(knows, limit, mean, whitening, without)
