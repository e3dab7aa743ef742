"""Vector modality: vectors of another encoder (users, items, audio, ...) through a projector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lapilli.config.model import ProjectorConfig
from lapilli.errors import MediaError
from lapilli.modality.projector import build_projector, output_layers
from lapilli.shapes import Float, Tensor


@dataclass(frozen=True, slots=True)
class PreparedVectors:
    """The vectors of one item, as the encoder left them."""

    values: Float[Tensor, "n E"]


class VectorModality(nn.Module):
    """A modality of items of n vectors [n, E], each one position behind a projector.

    A resampler makes the same number of positions of every item, however many vectors it has.

    Source: Ning et al. 2024, User-LLM section 3.2 (user embeddings as soft prompt).
    """

    def __init__(self, config: ProjectorConfig, *, name: str = "vector") -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.projector = build_projector(config)

    def prepare(self, raw: object) -> PreparedVectors:
        """Return one vector or several, anything that torch can read, as float32 [n, E].

        Raises:
            MediaError: not numbers, another width than the projector's, nothing, or not finite.
        """
        try:
            vectors = torch.as_tensor(raw, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MediaError(f"{self.name}: not a vector of numbers ({error})") from error
        if vectors.ndim == 1:
            vectors = vectors[None]
        width = self.config.vision_size
        if vectors.ndim != 2 or vectors.shape[1] != width or not len(vectors):
            raise MediaError(
                f"{self.name}: expected [n, {width}] or [{width}] numbers, n at least 1, "
                f"found {list(vectors.shape)}"
            )
        if not bool(vectors.isfinite().all()):
            raise MediaError(f"{self.name}: the vectors contain NaN or infinity")
        return PreparedVectors(vectors)

    def num_tokens(self, prepared: PreparedVectors) -> int:
        """Return one position per vector, or one per query of a resampler."""
        return self.config.num_queries or len(prepared.values)

    def output_layers(self) -> list[nn.Linear]:
        """Return the linear layers whose outputs, or means of them, are the features."""
        return output_layers(self.projector)

    def embed(self, items: Sequence[PreparedVectors]) -> list[Float[Tensor, "_ D"]]:
        """Return what the projector makes of the vectors, item by item."""
        if not items:
            return []
        weight = next(self.projector.parameters(), None)
        if self.config.num_queries and weight is not None:
            rows_of = [item.values.to(weight.device, weight.dtype) for item in items]
            return [self.projector(rows) for rows in rows_of]
        rows = torch.cat([item.values for item in items])
        if weight is not None:
            rows = rows.to(weight.device, weight.dtype)
        return list(torch.split(self.projector(rows), [len(item.values) for item in items]))
