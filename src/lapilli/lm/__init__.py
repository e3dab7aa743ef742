"""Language models behind one protocol: vectors in, hidden states and logits out.

Knows nothing of modalities, prompts or files.
"""

from typing import Protocol, runtime_checkable

from lapilli.config.model import DecoderConfig, MptConfig, TextConfig
from lapilli.errors import UnsupportedModelError
from lapilli.lm.cross_attention import Memory
from lapilli.lm.decoder import Decoder
from lapilli.lm.mpt import Mpt
from lapilli.nn.kv_cache import Cache, KVCache
from lapilli.shapes import Bool, Float, Int, Tensor

__all__ = [
    "Decoder",
    "LanguageModel",
    "Memory",
    "Mpt",
    "add_cross_attention",
    "build_language_model",
]


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model that reads vectors.

    `embed` makes vectors of ids, `forward` hidden states of vectors, `logits` scores of hidden
    states: three steps, so that other vectors can stand where ids have none, and so that logits
    are only computed where somebody reads them.
    """

    supports_varlen: bool
    """True if `forward` takes rows of several lengths, with a PagedBatch as its cache."""

    @property
    def config(self) -> TextConfig:
        """Sizes of the model."""
        ...

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Return the vectors of token ids."""
        ...

    def forward(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        *,
        position_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the hidden states after the final norm.

        Args:
            inputs_embeds: vectors of the T new positions.
            position_ids: their positions, counted without padding; any number under padding.
            attention_mask: False for padding, over all S = cache.length + T positions; None when
                no row is padded.
            cache: what was read before; the new positions are appended. With a PagedBatch the one
                row holds the new positions of many sequences, one after the other.
            memory: features beside the rows. Positions are counted in the row as it lies, padding
                and `cache.length` included, those of a ragged cache in the one row of this pass.
        """
        ...

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Return the scores of every vocabulary entry."""
        ...

    def token_logits(
        self, hidden: Float[Tensor, "... D"], ids: Int[Tensor, " n"]
    ) -> Float[Tensor, "... n"]:
        """Return the scores of these vocabulary entries alone, the same numbers as of `logits`."""
        ...

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """Return an empty cache for this model, in its dtype and on its device."""
        ...


def add_cross_attention(language_model: object, every: int) -> None:
    """Put fresh gated blocks before every n-th layer of a language model.

    Raises:
        ConfigError: there are fewer layers, or blocks already.
        UnsupportedModelError: it is not Llama-shaped.
    """
    if not isinstance(language_model, Decoder):
        raise UnsupportedModelError(
            f"{type(language_model).__name__} takes no gated cross-attention, which is for "
            'Llama-shaped language models: declare the modality with fusion = "tokens"'
        )
    language_model.add_cross_attention(every)


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
