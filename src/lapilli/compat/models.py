"""Model classes of the original: transformers' own, with pictures between the tokens.

    LlavaLlamaForCausalLM            LlamaForCausalLM of transformers
      .model                         LlavaLlamaModel: embed_tokens, layers, norm and
        .vision_tower.vision_tower   transformers' vision tower
        .mm_projector                lapilli's projector
        .image_newline
      .lm_head

Saving, hooks, PEFT, attentions, quantization and every option of generate() come from transformers.
"""

# The types of transformers differ from release to release, and no release has all of them.
# mypy: allow-untyped-calls, allow-subclassing-any, disable-error-code="misc,union-attr"

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lapilli.compat import present
from lapilli.compat.llava_arch import Images, LlavaMetaForCausalLM, LlavaMetaModel
from lapilli.compat.mm_utils import Foreign
from lapilli.compat.tokenizer import take_auto_tokenizer
from lapilli.shapes import Float, Int, Tensor

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaLlamaModel",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaMistralModel",
    "LlavaMptConfig",
    "LlavaMptForCausalLM",
    "LlavaMptModel",
    "LlavaQwenConfig",
    "LlavaQwenForCausalLM",
    "LlavaQwenModel",
]


class LegacyCache(DynamicCache):
    """Cache that can also be read as a tuple of (keys, values), one pair for every layer."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        layer = self.layers[index]
        return layer.keys, layer.values

    @classmethod
    def of(cls, past: Foreign) -> Foreign:
        """Return a cache of what a program gave: a cache, or pairs of keys and values."""
        if not isinstance(past, tuple | list):
            return past
        cache = cls()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        return cache


class LlavaForCausalLM(LlavaMetaForCausalLM):
    """Language model of transformers that reads pictures, called as the original is called."""

    # A frozen tower is read from where the config names it, not from the checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.", r"rotary_emb\.inv_freq"]  # noqa: RUF012

    _original: Any
    _stack: Any
    _stack_name = "model"
    _reads_images = True

    @classmethod
    def from_pretrained(
        cls,
        *args: Foreign,
        torch_dtype: Foreign = None,
        dtype: Foreign = None,
        device_map: Foreign = None,
        **options: Foreign,
    ) -> Foreign:
        """Read a checkpoint, in float32 where no type is asked for, as the original's release does.

        Later releases take the type of the file, and half precision does not train.
        """
        kind = dtype or torch_dtype or torch.float32
        placed = present(device_map)
        return super().from_pretrained(*args, dtype=kind, device_map=placed, **options)

    def __init__(self, config: Foreign) -> None:
        # Everything of transformers' class but its stack, in the place of which stands ours.
        super(self._original, self).__init__(config)
        setattr(self, self._stack_name, self._stack(config))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, self.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Foreign = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        return_dict: bool | None = None,
        cache: Foreign = None,
        **options: Foreign,
    ) -> Foreign:
        """Return logits of every position, and the loss when labels are given.

        The arguments are those of transformers' own forward in the original's order, and `images`
        and `image_sizes` of prepare_inputs_labels_for_multimodal. `input_ids` has -200 where a
        picture goes, `position_ids` of None counts positions with their padding, as the original
        does, and `cache` is what later releases call `past_key_values`: a cache, or its pairs.

        Raises:
            TypeError: images for MPT. Quirk 2: its class in the original calls its preparation with
                an argument too few, so that no program can have used it.
        """
        if images is not None and not self._reads_images:
            raise TypeError(
                "forward(images=...) of MPT fails in the original too: give the inputs_embeds that "
                "prepare_inputs_labels_for_multimodal() makes, or use generate()"
            )
        past = LegacyCache.of(past_key_values if cache is None else cache)
        if inputs_embeds is None and input_ids is not None:
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past, labels, images, image_sizes
            )
            input_ids, position_ids, attention_mask, past, inputs_embeds, labels = prepared
        keeps = self.config.use_cache if use_cache is None else use_cache
        if keeps and past is None and not self._recomputes:
            past = LegacyCache()
        if "position_ids" in inspect.signature(super().forward).parameters:
            options["position_ids"] = position_ids
        options[self._cache_name] = past
        with _Attentions(self, output_attentions):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=keeps,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **options,
            )

    @property
    def _recomputes(self) -> bool:
        """Return whether layers are computed again backwards, which goes with no cache."""
        return self.training and bool(getattr(self.base_model, "gradient_checkpointing", False))

    @property
    def _cache_name(self) -> str:
        """Return what this release of transformers calls its cache."""
        names = inspect.signature(super().forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    @torch.no_grad()
    def generate(
        self,
        inputs: Int[Tensor, "B L"] | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        **options: Foreign,
    ) -> Foreign:
        """Return one BOS and the new tokens of every row, without the prompt (quirk 1).

        Args:
            inputs: ids of the prompt, -200 where a picture goes.
            images: see prepare_inputs_labels_for_multimodal.
            image_sizes: (width, height) of every picture.
            options: of transformers' generate; max_length counts the BOS and the new tokens.

        Raises:
            NotImplementedError: inputs_embeds are given.
        """
        if "inputs_embeds" in options:
            raise NotImplementedError("generate() takes input ids, not inputs_embeds")
        ids = options.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ValueError("generate() needs the ids of a prompt as its first argument")
        options.pop("position_ids", None)
        mask = options.pop("attention_mask", None)
        embeds, mask = self._prompt_embeds(ids, mask, images, image_sizes)
        if embeds is None:
            embeds = self.get_input_embeddings()(ids)
        if mask is None:  # quirk 5: without a mask padding is text
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        config = options.get("generation_config") or self.generation_config
        bos = options.get("bos_token_id", config.bos_token_id)
        start = ids.new_full((len(embeds), 1), 0 if bos is None else bos)
        if not _chooses_cache(config, options):
            options[self._cache_name] = LegacyCache()
        return super().generate(start, inputs_embeds=embeds, attention_mask=mask, **options)

    def _prompt_embeds(
        self,
        ids: Int[Tensor, "B L"],
        mask: Tensor | None,
        images: Images | None,
        image_sizes: Sequence[Sequence[int]] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return embeddings and mask of a prompt; no embeddings where there are no pictures."""
        _, _, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            ids, None, mask, None, None, images, image_sizes
        )
        return embeds, mask

    def _prepare_generated_length(
        self, generation_config: Foreign, *_: object, input_ids_length: int, **__: object
    ) -> Foreign:
        """Count lengths as the original's release does: the BOS and the new tokens.

        Later releases count embeddings as well.
        """
        for name in ("max", "min"):
            new = getattr(generation_config, f"{name}_new_tokens")
            if new is not None:
                setattr(generation_config, f"{name}_length", new + input_ids_length)
        return generation_config

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Foreign
    ) -> dict[str, Any]:
        """Return the arguments of the next forward pass.

        Note: quirk 5. Rows may be padded on the right; positions are counted without padding, and
            padding stands at position 1, as the original's release of transformers counts them.
        """
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            positions = mask.long().cumsum(-1) - 1
            positions.masked_fill_(mask == 0, 1)
            given = prepared.get("inputs_embeds")
            length = (prepared["input_ids"] if given is None else given).shape[1]
            prepared["position_ids"] = positions[:, -length:]
        return prepared


class _Attentions:
    """Context that computes attention by the one way that can return it, while a call asks for it.

    The tower keeps its way: transformers' own switch would change its answers.
    """

    def __init__(self, model: Foreign, wanted: bool | None) -> None:
        self.configs = (model.config, model.base_model.config)
        asked = model.config.output_attentions if wanted is None else wanted
        self.before = model.config._attn_implementation
        self.changes = bool(asked) and self.before != "eager"

    def __enter__(self) -> None:
        self._set("eager")

    def __exit__(self, *_: object) -> None:
        self._set(self.before)

    def _set(self, name: str) -> None:
        for config in self.configs if self.changes else ():
            config._attn_implementation = name


def _chooses_cache(config: Foreign, options: dict[str, Any]) -> bool:
    """Return whether a call of generate says itself how keys and values are kept."""
    if options.get("use_cache", config.use_cache) is False:
        return True
    names = ("past_key_values", "cache", "cache_implementation", "prompt_lookup_num_tokens")
    chosen = [options.get(name) or getattr(config, name, None) for name in names]
    return any(chosen) or options.get("assistant_model") is not None


# Configurations take more keys than they declare, which a checker of signatures must not refuse:
# __no_type_check__.
class LlavaConfig(transformers.LlamaConfig):
    """Llama, Vicuna and Yi with pictures."""

    model_type = "llava_llama"
    __no_type_check__ = True


class LlavaMistralConfig(transformers.MistralConfig):
    """Mistral with pictures."""

    model_type = "llava_mistral"
    __no_type_check__ = True


class LlavaMptConfig(transformers.MptConfig):
    """MPT with pictures; its published files write the whole numbers of attn_config as 0.0."""

    model_type = "llava_mpt"
    __no_type_check__ = True

    def __init__(self, *args: Foreign, attn_config: Foreign = None, **options: Foreign) -> None:
        if isinstance(attn_config, dict):
            attn_config = {
                key: int(value) if isinstance(value, float) and value.is_integer() else value
                for key, value in attn_config.items()
            }
        super().__init__(*args, attn_config=attn_config, **options)


class LlavaQwenConfig(transformers.Qwen2Config):
    """Qwen2 with pictures, as LLaVA-NeXT names it."""

    model_type = "llava_qwen"
    __no_type_check__ = True


class LlavaLlamaModel(LlavaMetaModel, transformers.LlamaModel):
    """Layers of Llama with tower and projector."""

    config_class = LlavaConfig


class LlavaMistralModel(LlavaMetaModel, transformers.MistralModel):
    """Layers of Mistral with tower and projector.

    Note: the release of transformers that the original is pinned to leaves Mistral's window out of
        its default attention (it came back with 4.40), so that every position sees all before it;
        our own API keeps the window.
    """

    config_class = LlavaMistralConfig

    def __init__(self, config: Foreign) -> None:
        config = copy.copy(config)
        config.sliding_window = None
        super().__init__(config)


class LlavaMptModel(LlavaMetaModel, transformers.MptModel):
    """Blocks of MPT with tower and projector."""

    config_class = LlavaMptConfig


class LlavaQwenModel(LlavaMetaModel, transformers.Qwen2Model):
    """Layers of Qwen2 with tower and projector."""

    config_class = LlavaQwenConfig


class LlavaLlamaForCausalLM(LlavaForCausalLM, transformers.LlamaForCausalLM):
    """Llama, Vicuna and Yi."""

    config_class = LlavaConfig
    _original, _stack = transformers.LlamaForCausalLM, LlavaLlamaModel


class LlavaMistralForCausalLM(LlavaForCausalLM, transformers.MistralForCausalLM):
    """Mistral."""

    config_class = LlavaMistralConfig
    _original, _stack = transformers.MistralForCausalLM, LlavaMistralModel


class LlavaMptForCausalLM(LlavaForCausalLM, transformers.MptForCausalLM):
    """MPT."""

    config_class = LlavaMptConfig
    _original, _stack = transformers.MptForCausalLM, LlavaMptModel
    _stack_name = "transformer"
    _reads_images = False


class LlavaQwenForCausalLM(LlavaForCausalLM, transformers.Qwen2ForCausalLM):
    """Qwen2, which the original's successor has."""

    config_class = LlavaQwenConfig
    _original, _stack = transformers.Qwen2ForCausalLM, LlavaQwenModel


for _model in (
    LlavaLlamaForCausalLM,
    LlavaMistralForCausalLM,
    LlavaMptForCausalLM,
    LlavaQwenForCausalLM,
):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
take_auto_tokenizer()
