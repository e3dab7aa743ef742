"""Vector modality: vectors of another encoder (users, items, audio, ...) through a projector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lapilli.config.modalities import VectorConfig
from lapilli.config.model import ProjectorConfig
from lapilli.errors import ConfigError, MediaError
from lapilli.modality.projector import build_projector, output_layers
from lapilli.shapes import Float, Tensor


@dataclass(frozen=True, slots=True)
class PreparedVectors:
    """The vectors of one item, as the encoder left them."""

    values: Float[Tensor, "n E"]


class VectorModality(nn.Module):
    """A modality of items of n vectors [n, E], each one position behind a projector.

    A resampler makes the same number of positions of every item, however many vectors it has.

    Args:
        config: the projector, from the vectors' width E to the language model's.
        name: in messages.
        tokens: positions of every vector: the last layer is so many times as wide, and cut.
        made_by: fingerprint of the encoder whose vectors it was trained with; None: not known.

    Source: Ning et al. 2024, User-LLM section 3.2 (user embeddings as soft prompt).
    """

    def __init__(
        self,
        config: ProjectorConfig,
        *,
        name: str = "vector",
        tokens: int = 1,
        made_by: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.tokens = tokens
        self.made_by = made_by
        self.projector = build_projector(config)
        if tokens > 1:
            self.projector = _widened(self.projector, tokens)

    def prepare(self, raw: object) -> PreparedVectors:
        """Return one vector or several, anything that torch can read, as float32 [n, E].

        Raises:
            MediaError: not numbers, another width than the projector's, nothing, or not finite.
        """
        try:
            vectors = torch.as_tensor(raw, dtype=None if _has_type(raw) else torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise MediaError(f"{self.name}: not a vector of numbers ({error})") from error
        if vectors.is_complex() or vectors.is_meta or vectors.layout != torch.strided:
            raise MediaError(
                f"{self.name}: not a vector of numbers ({vectors.dtype} on {vectors.device} in the "
                f"layout {vectors.layout})"
            )
        vectors = vectors.to(torch.float32)
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
        """Return `tokens` positions per vector, or one per query of a resampler."""
        return self.config.num_queries or len(prepared.values) * self.tokens

    def blank(self) -> PreparedVectors:
        """Return an item of zeros, for processes that train without one."""
        return PreparedVectors(torch.zeros(1, self.config.vision_size))

    def output_layers(self) -> list[nn.Linear]:
        """Return the linear layers whose outputs, or means of them, are the features.

        None where one output is several features: a rotation is of one.
        """
        return output_layers(self.projector) if self.tokens == 1 else []

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
        features = self.projector(rows).reshape(-1, self.config.hidden_size)
        return list(torch.split(features, [self.num_tokens(item) for item in items]))


def _has_type(raw: object) -> bool:
    """Return whether something is an array, whose numbers have a type that may be a wrong one."""
    return hasattr(raw, "dtype")


def _widened(projector: nn.Module, tokens: int) -> nn.Module:
    """Return a linear or mlp projector whose last layer makes so many features of one."""
    last = projector[-1] if isinstance(projector, nn.Sequential) else projector
    if not isinstance(last, nn.Linear):
        raise ConfigError(f"tokens {tokens} needs a projector that ends in a linear layer")
    wide = nn.Linear(last.in_features, last.out_features * tokens, bias=last.bias is not None)
    if not isinstance(projector, nn.Sequential):
        return wide
    projector[-1] = wide
    return projector


def build(config: VectorConfig, *, name: str, hidden_size: int) -> VectorModality:
    """Build the modality that a checkpoint declares."""
    return VectorModality(
        config.projector_for(hidden_size),
        name=name,
        tokens=config.tokens,
        made_by=config.encoder,
    )
