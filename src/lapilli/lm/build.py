"""From a description of a language model to the module."""

from lapilli.config.model import DecoderConfig, MptConfig, TextConfig
from lapilli.errors import UnsupportedModelError
from lapilli.lm.decoder import Decoder
from lapilli.lm.mpt import Mpt


def build_language_model(config: TextConfig) -> Decoder | Mpt:
    """Return a language model with fresh weights; under `torch.device("meta")` without any.

    Raises:
        UnsupportedModelError: a description that no language model here follows.
    """
    if isinstance(config, DecoderConfig):
        return Decoder(config)
    if isinstance(config, MptConfig):
        return Mpt(config)
    raise UnsupportedModelError(
        f"no language model for a {type(config).__name__}: expected DecoderConfig or MptConfig; "
        "other families go through lapilli.lm.foreign"
    )
