"""Any Hugging Face causal language model behind the LanguageModel protocol (extra `hf`).

The only file that imports transformers, and only when a foreign model is asked for. It knows that
library's conventions; nothing else in lapilli does.
"""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lapilli.config.model import DecoderConfig
from lapilli.errors import GenerationError, UnsupportedModelError
from lapilli.lm.cross_attention import Memory, refuse_memory
from lapilli.nn.kv_cache import Cache, KVCache
from lapilli.shapes import Bool, Float, Int, Tensor


def load_foreign(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> "ForeignLanguageModel":
    """Return a causal language model of any family that transformers has.

    Args:
        source: a directory or a hub id, as AutoModelForCausalLM reads it. Code that lies beside
            the weights is not run.
        dtype: of the weights.
        device: where they go.

    Raises:
        UnsupportedModelError: transformers is not installed or cannot read the model, or the
            model does not split into embed, forward and logits.
    """
    transformers = _import_transformers()
    try:
        inner = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"transformers cannot load {source}: {error}") from error
    return ForeignLanguageModel(inner.to(device).eval())


class ForeignLanguageModel(nn.Module):
    """A transformers causal LM: its embeddings, its stack, its head, our cache.

    The model is tried on three tokens when it is wrapped: a family whose logits are more than
    head(hidden), or whose state is more than keys and values of one shape, is refused there
    instead of answering wrongly later.

    Note: `config` holds the sizes of the foreign model; its rotary and norm fields are not read.

    Raises:
        UnsupportedModelError: see above.
    """

    supports_varlen = False

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config = _sizes(inner)
        self._stack: Any = getattr(inner, "base_model", inner)
        if self._stack is inner:
            raise UnsupportedModelError(
                f"{type(inner).__name__} has no base model apart from its head"
            )
        parameters = inspect.signature(self._stack.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._cache_argument = cache_argument(self._stack)
        _try(self)

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Return the vectors of token ids."""
        module: Any = self.inner
        vectors: Tensor = module.get_input_embeddings()(ids)
        return vectors

    def forward(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        *,
        position_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the hidden states after the final norm; see LanguageModel.forward.

        Raises:
            UnsupportedModelError: ragged rows, which another library's attention cannot read, or
                features beside the sequence.
        """
        refuse_memory(memory, "a language model of transformers")
        if not isinstance(cache, KVCache | None):
            raise UnsupportedModelError(
                "the batching engine cannot run a language model of transformers: use generate()"
            )
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        hidden: Tensor = self._stack(
            inputs_embeds=inputs_embeds,
            attention_mask=None if attention_mask is None else attention_mask.long(),
            use_cache=cache is not None,
            **{
                self._cache_argument: None
                if cache is None
                else _as_foreign_cache(cache, self.config)
            },
            **positions,
        ).last_hidden_state
        return hidden

    def recompute_layers(self) -> None:
        """Forget the layers' inner values while training, and compute them again backwards."""
        module: Any = self.inner
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Return the scores of every vocabulary entry."""
        module: Any = self.inner
        scores: Tensor = module.get_output_embeddings()(hidden)
        return scores

    def token_logits(
        self, hidden: Float[Tensor, "... D"], ids: Int[Tensor, " n"]
    ) -> Float[Tensor, "... n"]:
        """Return the scores of these vocabulary entries alone."""
        return self.logits(hidden)[..., ids]

    def new_cache(self, batch: int, capacity: int = 256) -> KVCache:
        """Return an empty cache in the dtype and on the device of the weights."""
        weight = next(self.inner.parameters())
        return KVCache(self.config, batch, weight.dtype, weight.device, capacity=capacity)


def cache_argument(stack: nn.Module) -> str:
    """Return the name under which `stack.forward` takes its cache.

    transformers 5.24 renamed `past_key_values` to `cache`, family by family, and will drop the
    older name in 5.40, so the signature decides and not the version.
    """
    return "cache" if "cache" in inspect.signature(stack.forward).parameters else "past_key_values"


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedModelError(
            "a foreign language model needs the library transformers: pip install 'lapilli[hf]'"
        ) from error
    return transformers


def _sizes(inner: Any) -> DecoderConfig:  # noqa: ANN401 - transformers' classes are untyped
    """Return the sizes that generation and the cache ask for."""
    config = inner.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no attention heads: only families that keep keys and "
            "values can be read with a cache"
        )
    return DecoderConfig(
        family=config.model_type,
        vocab_size=inner.get_output_embeddings().weight.shape[0],
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        norm_eps=0.0,
        rope_theta=0.0,
        max_positions=config.max_position_embeddings,
    )


def _as_foreign_cache(cache: KVCache, config: DecoderConfig) -> Any:  # noqa: ANN401
    """Return a transformers cache that keeps everything in ours; made anew for every pass."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers has no types
        def __init__(self, index: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # transformers has no types
            self.index = index
            self.length = cache.length

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
        ) -> tuple[Tensor, Tensor]:
            keys, values = cache.append(self.index, key_states, value_states)
            self.length = keys.shape[2]
            return keys, values

        def get_seq_length(self) -> int:
            return self.length

    return Cache(layers=[Layer(index) for index in range(config.num_layers)])


@torch.no_grad()
def _try(model: ForeignLanguageModel) -> None:
    """Compare three tokens at once with one after the other through our cache and our logits."""
    weight = next(model.inner.parameters())
    ids = torch.arange(1, 4, device=weight.device)[None]
    name = type(model.inner).__name__
    training = model.inner.training
    model.inner.eval()
    try:
        expected = model.inner(input_ids=ids).logits
        cache = model.new_cache(1, capacity=3)
        places = torch.arange(3, device=weight.device)[None]
        steps = [
            model.forward(
                model.embed(ids[:, i : i + 1]), position_ids=places[:, i : i + 1], cache=cache
            )
            for i in range(3)
        ]
        found = model.logits(torch.cat(steps, dim=1))
    except (TypeError, AttributeError, RuntimeError, GenerationError) as error:
        raise UnsupportedModelError(
            f"{name} cannot be read vector by vector with a cache of keys and values: {error}"
        ) from error
    finally:
        model.inner.train(training)
    tolerance = 1e-3 if weight.dtype == torch.float32 else 0.1
    worst = (found - expected).abs().max().item()
    if not worst <= tolerance * max(1.0, expected.abs().max().item()):
        raise UnsupportedModelError(
            f"{name}: logits from the cache differ from its own by {worst:.3g}: the family does "
            "more than attention over keys and values and head(hidden)"
        )
