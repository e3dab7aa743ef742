"""TinyChat's LLaVA (tinychat.models.llava_llama of llm-awq) over the classes of the other names.

    forward(start_pos=None)  every position: loss, logits, hidden states and attentions
    forward(start_pos=n)     the positions from n on, after keys and values that the model keeps;
                             float32 logits of the last one, [B, 1, V]

    special_token=False      every patch has a token <im_patch>, whose embedding is replaced
    special_token=True       one id of -200 stands for a whole picture (llava_arch.py)

The module is tinychat.utils.constants as well: programs set the id of <im_patch> there, and it is
read in every call. In the reference the first mode raises a TypeError; here it does what its
documentation says. Attention of a later turn sees the earlier ones, which the reference does on
request only.
"""

# mypy: allow-untyped-calls, disable-error-code="misc,union-attr,override,arg-type"

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from lapilli.compat import present
from lapilli.compat.llava_arch import Images, LlavaMetaForCausalLM, LlavaMetaModel
from lapilli.compat.mm_utils import IMAGE_TOKEN_INDEX, Foreign
from lapilli.compat.models import LegacyCache, LlavaConfig, LlavaLlamaModel
from lapilli.compat.models import LlavaLlamaForCausalLM as Original
from lapilli.shapes import Float, Int, Tensor

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaLlamaModel",
    "LlavaMetaForCausalLM",
    "LlavaMetaModel",
]

LOG = logging.getLogger(__name__)

max_seq_len = 8192
max_batch_size = 1  # nothing here depends on it: rows are as many as are given
llama_multiple_of = 256
mem_efficient_load = False
LLAVA_IGNORE_INDEX = -100
LLAVA_DEFAULT_IMAGE_TOKEN = "<image>"  # noqa: S105
LLAVA_DEFAULT_IMAGE_TOKEN_IDX = IMAGE_TOKEN_INDEX
LLAVA_DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"  # noqa: S105
LLAVA_DEFAULT_IMAGE_PATCH_TOKEN_IDX = 32000
LLAVA_DEFAULT_IM_START_TOKEN = "<im_start>"  # noqa: S105
LLAVA_DEFAULT_IM_END_TOKEN = "<im_end>"  # noqa: S105
LLAVA_DEFAULT_IM_TOKEN_PLACE_HOLDER = "<image>"  # noqa: S105
AUTO_FILL_IM_TOKEN_HOLDER = "<im_holder>"  # noqa: S105
CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
_BOTH_LAYERS = 100
"""From this on the number of a layer names two: -212 stands for 12 and -2."""


def init() -> None:
    """Do nothing: the constants of the reference, which its `init` makes, are there already."""


class LlavaLlamaForCausalLM(Original):
    """Llama with pictures, called as TinyChat calls it.

    Args:
        config: of the language model, with the `mm_` keys of the pictures. `neftune_alpha` adds
            noise to the features of pictures while training, and with `neftune_noise_in_eval` at
            other times too, as the reference does; `tune_vision_encoder` lets gradients reach the
            tower.
        dev: where the weights go; every name of a GPU means the CPU where there is none.
    """

    def __init__(self, config: Foreign, dev: Foreign = "cuda") -> None:
        super().__init__(_with_pictures(config))
        self.pretraining_tp = getattr(config, "pretraining_tp", 1)
        self._kept: Any = None  # keys and values of the positions before the next start_pos
        if self.lm_head.weight.device.type != "meta":
            self.to(present(dev))

    def forward(
        self,
        input_ids: Int[Tensor, "B L"] | None = None,
        start_pos: int | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Foreign = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B L"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Images | None = None,
        return_dict: bool | None = None,
        special_token: bool = False,
        cache: Foreign = None,
        **options: Foreign,
    ) -> Foreign:
        """Return the output of transformers, or the logits of the last position.

        Args:
            input_ids: with a place for every patch, or with -200 for every picture.
            start_pos: None: all positions at once. A number: so many positions of the keys and
                values of earlier calls come before these; positions, `past_key_values` and what
                would change the output are not read then.
            attention_mask: see the forward of the other names, as everything that is not said here.
            position_ids: likewise.
            past_key_values: likewise.
            inputs_embeds: taken as they are; neither kind of place is looked for.
            labels: of the tokens, -100 where there is no target.
            use_cache: likewise.
            output_attentions: of every layer; they cost the memory of all scores.
            output_hidden_states: of every layer.
            images: [N, 3, H, W] or a list, in the order of their places over the whole batch.
            return_dict: False for a tuple.
            special_token: which kind of place the ids have.
            cache: another name of `past_key_values`.
            options: of transformers' forward.

        Raises:
            ValueError: no input; a picture is missing; `start_pos` lies behind what is kept, or the
                end behind what the model reads; padding or labels with it.
            IndexError: an id of -200 without special_token.
            AssertionError: patches of half a picture.
        """
        if inputs_embeds is None and input_ids is None:
            raise ValueError("forward() needs input_ids or inputs_embeds")
        if start_pos is not None:
            _check_rows(input_ids, attention_mask, labels, special_token=special_token)
        if inputs_embeds is None and special_token:
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                prepared
            )
        elif inputs_embeds is None:
            inputs_embeds = self.default_inputs_embeds_for_multimodal(input_ids, None, images)
        if start_pos is not None:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            return self._continue(start_pos, inputs_embeds)
        return super().forward(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            cache=cache,
            **options,
        )

    @torch.no_grad()
    def _continue(self, start_pos: int, inputs_embeds: Float[Tensor, "B T D"]) -> Tensor:
        """Return float32 logits of the last position, and keep keys and values of all.

        Note: what lies behind `start_pos` is forgotten: a turn may be asked again.
        """
        rows, length = inputs_embeds.shape[:2]
        kept = 0 if self._kept is None else self._kept.get_seq_length()
        most = min(max_seq_len, self.config.max_position_embeddings)
        if not 0 <= start_pos <= kept:
            raise ValueError(
                f"start_pos is {start_pos}, but keys and values of {kept} positions are kept: call "
                "forward() with all earlier positions first, from start_pos=0"
            )
        if start_pos + length > most:
            raise ValueError(
                f"{length} positions from {start_pos} on end behind the {most} that the model reads"
            )
        if start_pos == 0:
            self._kept = LegacyCache()
        elif self._kept[0][0].shape[0] != rows:
            raise ValueError(
                f"{rows} rows continue {self._kept[0][0].shape[0]}: begin again with start_pos=0"
            )
        elif start_pos < kept:
            layers = range(self.config.num_hidden_layers)
            pairs = [tuple(part[:, :, :start_pos] for part in self._kept[i]) for i in layers]
            self._kept = LegacyCache.of(pairs)
        places = torch.arange(start_pos, start_pos + length, device=inputs_embeds.device)
        output = super().forward(
            inputs_embeds=inputs_embeds,
            position_ids=places.expand(rows, -1),
            past_key_values=self._kept,
            use_cache=True,
            return_dict=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1:].float()
        return logits

    def default_inputs_embeds_for_multimodal(
        self,
        input_ids: Int[Tensor, "B L"],
        inputs_embeds: Float[Tensor, "B L D"] | None,
        images: Images | None,
    ) -> Float[Tensor, "B L D"]:
        """Return embeddings in which those of patch tokens are the features of pictures.

        Without a tower, without images, or for one token outside of training, nothing is replaced.
        Start and end tokens around a picture are tokens like others.

        Note: as in the reference, the patches of a picture are taken for neighbours: what stands
            between two parts of a run is overwritten, and pictures that no place is left for are
            ignored. lapilli's own API refuses both.

        Raises:
            ValueError: more places than pictures, outside of training.
            IndexError: an id of -200, which is a place of the other kind.
            AssertionError: patches that are no multiple of a picture's.
        """
        if inputs_embeds is None:
            if bool((input_ids == IMAGE_TOKEN_INDEX).any()):
                raise IndexError(
                    f"id {IMAGE_TOKEN_INDEX} has no embedding: call forward(special_token=True), "
                    "or write <im_patch> for every patch"
                )
            inputs_embeds = self.get_input_embeddings()(input_ids)
        is_step = input_ids.shape[1] == 1 and not self.training
        if self.get_vision_tower() is None or images is None or is_step:
            return inputs_embeds
        features = self._patch_features(images).to(inputs_embeds.dtype)
        places = input_ids == LLAVA_DEFAULT_IMAGE_PATCH_TOKEN_IDX
        used, rows = 0, []
        for row, embeds in zip(places, inputs_embeds, strict=True):
            filled, used = self._fill(row.nonzero().flatten().tolist(), embeds, features, used)
            rows.append(filled)
        # Every picture may be unused: its projector still belongs to the graph, for DDP.
        return torch.stack(rows) + 0.0 * features.sum() if self.training else torch.stack(rows)

    def _fill(
        self,
        places: Sequence[int],
        embeds: Float[Tensor, "L D"],
        features: Float[Tensor, "N P D"],
        used: int,
    ) -> tuple[Float[Tensor, "L D"], int]:
        """Return one row with its pictures, and how many are used up after it."""
        size = features.shape[1]
        while places:
            if used >= len(features):
                if self.training:
                    LOG.warning(
                        "a row has patches of more than the %d pictures: left as tokens", used
                    )
                    break
                raise ValueError(
                    f"INDEXING ERROR! {len(places)} patch tokens are left over after all "
                    f"{len(features)} pictures: give a picture for every {size} of them"
                )
            if len(places) < size:
                raise AssertionError(
                    (len(places) - size, size),
                    f"{len(places)} patch tokens are no picture: one has {size}",
                )
            start = places[0]
            embeds = torch.cat([embeds[:start], features[used], embeds[start + size :]])
            places = places[size:]
            used += 1
        return embeds, used

    def _patch_features(self, images: Images) -> Float[Tensor, "N P D"]:
        """Return projected features of pictures, with noise where the config asks for it.

        The layers are chosen as the reference chooses them: `mm_vision_select_layer`, or two of
        them side by side, always without CLIP's first one.

        Source: NEFTune, arXiv 2310.05914, section 2, on the features of pictures alone.
        """
        if not isinstance(images, Tensor):
            images = torch.cat([image[None] if image.ndim == 3 else image for image in images])
        stack, tower = self.get_model(), self.get_vision_tower()
        tower.load_model()
        number = getattr(self.config, "mm_vision_select_layer", -1)
        layers = [number]
        if abs(number) > _BOTH_LAYERS:
            layers = [abs(number) % _BOTH_LAYERS, -(abs(number) // _BOTH_LAYERS)]
        tuned = getattr(self.config, "tune_vision_encoder", False)
        with contextlib.nullcontext() if tuned else torch.no_grad():
            states = tower.hidden_states(images.to(tower.device, tower.dtype), layers)
        chosen = torch.cat(states, dim=-1)
        if "siglip" not in tower.config.model_type:
            chosen = chosen[:, 1:].to(images.dtype)
        like = next(stack.mm_projector.parameters(), chosen)
        features: Tensor = stack.mm_projector(chosen.to(like.device, like.dtype))
        alpha = getattr(self.config, "neftune_alpha", None) or 0.0
        is_noisy = self.training or getattr(self.config, "neftune_noise_in_eval", False)
        if alpha > 0 and is_noisy:
            patches, width = features.shape[-2:]
            most = alpha / (patches * width) ** 0.5
            features = features + torch.empty_like(features).uniform_(-most, most)
        return features

    def _prompt_embeds(
        self,
        ids: Int[Tensor, "B L"],
        mask: Tensor | None,
        images: Images | None,
        image_sizes: Sequence[Sequence[int]] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return embeddings and mask of a prompt for generate(), whichever places it has."""
        if bool((ids == IMAGE_TOKEN_INDEX).any()):
            return super()._prompt_embeds(ids, mask, images, image_sizes)
        return self.default_inputs_embeds_for_multimodal(ids, None, images), mask

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Foreign = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Foreign,
    ) -> dict[str, Any]:
        """Return the arguments of the next forward pass, with `images` where they are given."""
        images = kwargs.pop("images", None)
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        prepared = super().prepare_inputs_for_generation(input_ids, inputs_embeds, **kwargs)
        return prepared if images is None else {**prepared, "images": images}


def _check_rows(
    ids: Tensor | None, mask: Tensor | None, labels: Tensor | None, *, special_token: bool
) -> None:
    """Check that no row has padding: all keep their keys and values at the same positions.

    Raises:
        ValueError: one has, or there are labels, for which this mode has no loss.
    """
    if labels is not None:
        raise ValueError("forward(start_pos=...) has no loss: leave out start_pos or the labels")
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError(
            "forward(start_pos=...) takes rows without padding, but attention_mask has zeros: ask "
            "the rows one by one"
        )
    if special_token and ids is not None and ids.shape[1] > 1:
        counts = (ids == IMAGE_TOKEN_INDEX).sum(dim=1)
        if bool((counts != counts[0]).any()):
            raise ValueError(
                "forward(start_pos=...) takes rows with the same number of pictures, found "
                f"{counts.tolist()}: ask the rows one by one"
            )


def _with_pictures(config: Foreign) -> LlavaConfig:
    """Return a configuration of the class that the model is registered with."""
    if isinstance(config, LlavaConfig):
        return config
    if isinstance(config, PreTrainedConfig):
        return LlavaConfig(**config.to_dict())
    return LlavaConfig(**vars(config))
