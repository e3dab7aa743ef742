"""Features of the media in a prompt: kept ones by content, the others from their modality."""

from typing import Any

import torch

from lapilli.errors import FusionError
from lapilli.generate.cache.features import FeatureCache
from lapilli.generate.engine.memory import give_back
from lapilli.generate.engine.sequence import Sequence
from lapilli.model.vlm import VisionLanguageModel
from lapilli.prompt.encode import Span
from lapilli.shapes import Float, Tensor


class MediaReader:
    """Looks at media when their positions are read, each content once per epoch of the weights.

    Args:
        model: whose modalities look.
        cache: what was seen before.
    """

    def __init__(self, model: VisionLanguageModel, cache: FeatureCache) -> None:
        self._model = model
        self._cache = cache
        self.looks = 0
        """Media that went through their modality."""

    def readable(self, sequence: Sequence, count: int, *, epoch: int, looks: int) -> int:
        """How many of the next `count` positions have features, after at most `looks` new looks.

        Raises:
            FusionError: features that do not fit their span.
            UnsupportedModelError: a modality that the model does not have.
        """
        start = sequence.length
        for i, span in enumerate(sequence.prompt.spans):
            is_ahead = span.start < start + count and span.start + span.length > start
            if not is_ahead or sequence.features[i] is not None:
                continue
            known = self._known(sequence.media[i], sequence.digests[i], epoch)
            if known is None:
                if looks <= 0:
                    return max(0, span.start - start)
                looks -= 1
                known = self._look(sequence.media[i], span.modality)
                self._cache.put((sequence.digests[i], epoch), known)
            check_features(known, span, self._model.language_model.config.hidden_size)
            sequence.features[i] = known
        return count

    def _known(self, item: Any, digest: bytes, epoch: int) -> Tensor | None:  # noqa: ANN401
        return item if isinstance(item, Tensor) else self._cache.get((digest, epoch))

    @torch.inference_mode()
    def _look(self, item: Any, modality: str) -> Float[Tensor, "n D"]:  # noqa: ANN401
        self.looks += 1
        [features] = self._model.modality(modality).embed([item])
        give_back()
        return features


def check_features(features: Tensor, span: Span, width: int) -> None:
    """Refuse features that are not what their span was counted for.

    Raises:
        FusionError: another shape.
    """
    if tuple(features.shape) != (span.length, width):
        raise FusionError(
            f"the {span.modality} at position {span.start}: the span has {span.length} positions "
            f"of width {width}, the features are {list(features.shape)}"
        )


def lay_over(embeddings: Float[Tensor, "T D"], sequence: Sequence, *, at: int, count: int) -> None:
    """Features written over the embeddings of `count` new positions, which begin at `at`."""
    start = sequence.length
    for span, features in zip(sequence.prompt.spans, sequence.features, strict=True):
        first = max(span.start, start)
        last = min(span.start + span.length, start + count)
        if first < last and features is not None:
            new = features[first - span.start : last - span.start]
            embeddings[at + first - start : at + last - start] = new.to(
                embeddings.device, embeddings.dtype
            )
