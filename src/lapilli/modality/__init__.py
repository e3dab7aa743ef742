"""Protocol of a modality: something that can stand where tokens stand.

raw --prepare()--> Prepared --num_tokens()--> span in the prompt
                      '--embed([...])-------> features [n, D], n as promised

What a checkpoint declares is built here, by the table of kinds in config/modalities.py.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lapilli.config.modalities import kind_of
from lapilli.config.model import ModalityConfig
from lapilli.errors import ConfigError
from lapilli.shapes import Float, Tensor


@runtime_checkable
class Modality(Protocol):
    """A kind of media that can stand where tokens stand.

    What `prepare` returns is the modality's own; it only travels from there to `num_tokens` and
    `embed`. A dataclass of tensors and numbers is found again in caches by its content.

    A module may have an `encoder`, which rests in training unless `model.tune_encoder` names it, a
    `tokenizer`, which is then given the language model's, and `blank()`, a prepared item of zeros
    for processes that train together and have none in their batch.
    """

    @property
    def name(self) -> str:
        """Return the name that spans and messages carry, for instance "image"."""
        ...

    def prepare(self, raw: Any) -> Any:  # noqa: ANN401 - every modality has its own raw form
        """Return the numbers of one item, on the CPU, without parameters."""
        ...

    def num_tokens(self, prepared: Any) -> int:  # noqa: ANN401
        """Return the positions that the item takes in the prompt, from sizes alone."""
        ...

    def embed(self, items: Sequence[Any]) -> list[Float[Tensor, "_ D"]]:
        """Return the features of every item, as many as `num_tokens` says, whatever the others."""
        ...


def build_modality(name: str, config: ModalityConfig, *, hidden_size: int) -> nn.Module:
    """Build a declared modality for a language model of this width, with fresh weights.

    Raises:
        ConfigError: its settings do not fit the language model, or the kind builds no modality.
        UnsupportedModelError: nobody registered its kind.
    """
    try:
        module = kind_of(config).builder()(config, name=name, hidden_size=hidden_size)
    except ConfigError as error:
        raise ConfigError(f"modality {name!r}: {error}") from error
    if not (isinstance(module, nn.Module) and isinstance(module, Modality)):
        raise ConfigError(
            f"modality {name!r}: the kind {config.kind!r} builds a {type(module).__name__}, "
            "expected a torch module with name, prepare, num_tokens and embed"
        )
    return module
