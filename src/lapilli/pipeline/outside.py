"""Whether pictures lie outside of what a narrow checkpoint was trained on.

Knows pictures and the checkpoint's world; must not know questions or answers.
"""

from typing import cast

import torch

from lapilli.checkpoint.world import World
from lapilli.generate.engine.feature_cache import content_digest
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.pixels import PreparedImage
from lapilli.model.vlm import VisionLanguageModel
from lapilli.pipeline.answering import Answering
from lapilli.pipeline.memory import Memory


class Outside:
    """Looks at every picture once; what the tower saw for this becomes the picture's features.

    Args:
        world: of the checkpoint; most say nothing about theirs.
        model: has the tower.
        answering: is given the features.
    """

    def __init__(
        self, world: World | None, model: VisionLanguageModel, answering: Answering
    ) -> None:
        self._world = world
        self._model = model
        self._answering = answering
        self._judged: dict[bytes, bool] = {}
        self.is_latest = False
        """Whether a picture of the latest question lies outside."""

    @torch.inference_mode()
    def judge(self, memory: Memory) -> None:
        """Look at the pictures that were added to a conversation since the last time."""
        new, memory.judged = memory.items[memory.judged :], len(memory.items)
        pictures = [item for item in new if isinstance(item, PreparedImage)]
        self.is_latest = any(self._is_outside(picture) for picture in pictures)

    def _is_outside(self, picture: PreparedImage) -> bool:
        if self._world is None:
            return False
        digest = content_digest(picture)
        if digest not in self._judged:
            modality = cast("ImageModality", self._model.modality("image"))
            seen = modality.tower_features(picture.pixel_values)
            self._judged[digest] = not self._world.contains(seen.flatten(0, 1))
            features = modality.merge(modality.projector(seen), picture)
            self._answering.keep_features(modality.name, picture, features)
        return self._judged[digest]

    def warning(self, name: str) -> str | None:
        """One line for people; None when the latest pictures are like those of the training."""
        if self._world is None or not self.is_latest:
            return None
        return (
            f"this picture is unlike those that {name} was made for: {self._world.knows} "
            "Load a LLaVA checkpoint for others, for instance llava-hf/llava-1.5-7b-hf."
        )
