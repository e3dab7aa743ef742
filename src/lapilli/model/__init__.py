"""Fusion of media into rows of text, and the vision language model."""

from lapilli.model.fuse import FusedBatch, fuse
from lapilli.model.vlm import VisionLanguageModel

__all__ = ["FusedBatch", "VisionLanguageModel", "fuse"]
