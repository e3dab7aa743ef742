"""Fusion of media into rows of text, and the vision language model."""

from lapilli.model.fuse import fuse
from lapilli.model.outputs import FusedBatch
from lapilli.model.vlm import VisionLanguageModel

__all__ = ["FusedBatch", "VisionLanguageModel", "fuse"]
