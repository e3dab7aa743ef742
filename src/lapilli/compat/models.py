"""The model classes of the original over our own model (llava.model).

    LlavaLlamaForCausalLM                    our modules under the original's names
      .model                                 embed_tokens, layers, norm
        .vision_tower.vision_tower           VisionTransformer
        .mm_projector, .image_newline
      .lm_head

Every weight is shared with the VisionLanguageModel inside; nothing is copied.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from lapilli.compat.configuration import LlavaConfig
from lapilli.compat.constants import IGNORE_INDEX
from lapilli.compat.foreign import Foreign
from lapilli.compat.generation import GenerationDefaults, generate
from lapilli.compat.image_processor import BatchFeature, CLIPImageProcessor
from lapilli.compat.preparation import Images, LlavaMetaForCausalLM
from lapilli.compat.tokenizer import PreTrainedTokenizer
from lapilli.compat.tower import CLIPVisionTower
from lapilli.modality.image.image import ImageModality
from lapilli.model.vlm import VisionLanguageModel
from lapilli.nn.kv_cache import KVCache
from lapilli.shapes import Float, Int, Tensor

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralForCausalLM",
    "LlavaMptForCausalLM",
]


class CausalLMOutputWithPast(BatchFeature):
    """`loss`, `logits`, `past_key_values`, by name or by number; what is None is left out."""

    def __getitem__(self, key: Foreign) -> Foreign:
        return (
            list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)
        )

    def __getattr__(self, name: str) -> Foreign:
        return self.get(name)


class LlavaModel(nn.Module):
    """The stack under the head, with the projector and the tower beside its layers."""

    def __init__(self, stack: nn.Module, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        for name, child in stack.named_children():
            self.add_module(name, child)

    def attach(self, images: ImageModality, processor: CLIPImageProcessor) -> None:
        """Put the tower, the projector and the end of a row where the original has them."""
        self.vision_tower = CLIPVisionTower(images.vision_tower, processor)
        self.mm_projector = images.projector
        if images.image_newline is not None:
            self.image_newline = images.image_newline

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """The tower, or None for a model without pictures."""
        return getattr(self, "vision_tower", None)


class LlavaForCausalLM(LlavaMetaForCausalLM):
    """A language model that reads pictures, called as the original is called.

    Args:
        inner: our model.
        config: attributes of config.json.
        tokenizer: of the checkpoint, for the ids that generation starts and ends with.
        defaults: what generation_config.json says.
        processor: of the tower; None for a model without pictures.
    """

    stack_name = "model"

    def __init__(
        self,
        inner: VisionLanguageModel,
        config: LlavaConfig,
        *,
        tokenizer: PreTrainedTokenizer,
        defaults: GenerationDefaults,
        processor: CLIPImageProcessor | None,
    ) -> None:
        super().__init__()
        # Not registered: its parameters have other names, and they are all here already.
        self._inner = (inner,)
        self.config = config
        self.generation_config = defaults
        self._tokenizer = tokenizer
        language_model = cast("nn.Module", inner.language_model)
        stack = LlavaModel(language_model.get_submodule(self.stack_name), config)
        if processor is not None:
            stack.attach(self.image_modality, processor)
        self.add_module(self.stack_name, stack)
        if hasattr(language_model, "lm_head"):
            self.lm_head = language_model.lm_head
        self.eval()

    @property
    def inner(self) -> VisionLanguageModel:
        """Our model, which shares every weight."""
        return self._inner[0]

    @property
    def image_modality(self) -> ImageModality:
        """Our pictures."""
        return cast("ImageModality", self.inner.modality("image"))

    def get_model(self) -> LlavaModel:
        """The stack under the head."""
        return cast("LlavaModel", self.get_submodule(self.stack_name))

    def embed_tokens(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Vectors of token ids.

        Raises:
            IndexError: an id outside the vocabulary, such as -200 without a picture (quirk 4).
        """
        return self.inner.language_model.embed(ids)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens."""
        stack = self.get_model()
        return cast("nn.Module", getattr(stack, "embed_tokens", None) or stack.wte)

    def get_output_embeddings(self) -> nn.Module:
        """The head, or the embedding that it is tied to."""
        return getattr(self, "lm_head", None) or self.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return next(self.parameters()).dtype

    def forward(
        self,
        input_ids: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of every position, and the loss when labels are given.

        Args:
            input_ids: -200 where a picture goes.
            attention_mask: False or 0 for padding.
            position_ids: None counts the positions with their padding, as the original does.
            past_key_values: a cache that an earlier call returned.
            inputs_embeds: in place of input_ids, when they are prepared already.
            labels: -100 where the loss does not count.
            use_cache: return a cache.
            output_attentions: not kept.
            output_hidden_states: also return the last hidden state, as `hidden_states`.
            images: see prepare_inputs_labels_for_multimodal.
            image_sizes: (width, height) of every picture.
            return_dict: False returns a tuple.
        """
        if inputs_embeds is None and input_ids is not None:
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids,
                position_ids,
                attention_mask,
                past_key_values,
                labels,
                images,
                image_sizes,
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                prepared
            )
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed_tokens(input_ids)
        hidden, cache = self._hidden(
            inputs_embeds, position_ids, attention_mask, past_key_values, use_cache=bool(use_cache)
        )
        logits = self.inner.language_model.logits(hidden)
        values = {
            "loss": None if labels is None else causal_loss(logits, labels),
            "logits": logits,
            "past_key_values": cache,
            "hidden_states": (hidden,) if output_hidden_states else None,
        }
        output = CausalLMOutputWithPast({k: v for k, v in values.items() if v is not None})
        return output if return_dict is not False else tuple(output.values())

    def _hidden(
        self,
        embeds: Float[Tensor, "B T D"],
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: KVCache | None,
        *,
        use_cache: bool,
    ) -> tuple[Float[Tensor, "B T D"], KVCache | None]:
        rows, length = embeds.shape[:2]
        language_model = self.inner.language_model
        if use_cache and cache is None:
            cache = language_model.new_cache(rows, length)
        past = 0 if cache is None else cache.length
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=embeds.device)[None]
        mask = None if attention_mask is None else attention_mask.bool()
        hidden = language_model.forward(
            embeds,
            position_ids=position_ids.expand(rows, length),
            attention_mask=None if mask is None or bool(mask.all()) else mask,
            cache=cache,
        )
        return hidden, cache

    @torch.no_grad()
    def generate(
        self,
        inputs: Int[Tensor, "B L"] | None = None,
        images: Images | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Foreign,
    ) -> Foreign:
        """One BOS and the new tokens of every row, without the prompt (quirk 1).

        Raises:
            NotImplementedError: inputs_embeds are given.
            GenerationError: an option that lapilli does not have.
        """
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("generate() takes input ids, not inputs_embeds")
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ValueError("generate() needs the ids of a prompt as its first argument")
        positions = kwargs.pop("position_ids", None)
        mask = kwargs.pop("attention_mask", None)
        _, _, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            ids, positions, mask, None, None, images, image_sizes
        )
        if embeds is None:
            embeds = self.embed_tokens(ids)
        return generate(
            self.inner,
            embeds,
            mask,
            self._tokenizer,
            defaults=self.generation_config,
            options=kwargs,
        )

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Module:
        """The embedding, which loading has given the length of the tokenizer already.

        Raises:
            ValueError: another length.
        """
        embedding = self.get_input_embeddings()
        rows = cast("Tensor", embedding.weight).shape[0]
        if new_num_tokens not in (None, rows):
            raise ValueError(
                f"the embedding has {rows} rows, as many as the tokenizer had at loading; "
                f"{new_num_tokens} were asked for: add tokens to the checkpoint's files instead"
            )
        return embedding

    def tie_weights(self) -> None:
        """Nothing: what is tied shares its weight."""

    def can_generate(self) -> bool:
        """Yes."""
        return True


def causal_loss(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean negative log likelihood of every labelled next token, in float32.

    Source: transformers LlamaForCausalLM. A batch without a single label gives NaN, as there.
    """
    scores = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(scores, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


class LlavaLlamaForCausalLM(LlavaForCausalLM):
    """Llama, Vicuna and Yi."""


class LlavaMistralForCausalLM(LlavaForCausalLM):
    """Mistral."""


class LlavaMptForCausalLM(LlavaForCausalLM):
    """MPT."""

    stack_name = "transformer"

    def forward(self, *args: Foreign, **kwargs: Foreign) -> Foreign:
        """Logits of prepared embeddings or of text; see LlavaForCausalLM.

        Raises:
            TypeError: images are given. Quirk 2: the class of the original calls its preparation
                with an argument too few, so that no program can have used it.
        """
        if kwargs.get("images") is not None:
            raise TypeError(
                "forward(images=...) of MPT fails in the original too: give the inputs_embeds that "
                "prepare_inputs_labels_for_multimodal() makes, or use generate()"
            )
        return super().forward(*args, **kwargs)
