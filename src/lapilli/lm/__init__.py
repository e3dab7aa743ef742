"""Language models behind one protocol: vectors in, hidden states and logits out."""

from lapilli.lm.base import LanguageModel, build_language_model
from lapilli.lm.decoder import Decoder

__all__ = ["Decoder", "LanguageModel", "build_language_model"]
