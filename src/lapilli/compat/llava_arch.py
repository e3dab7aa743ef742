"""Text ids and pictures -> embeddings, exactly as the original does it (llava.model.llava_arch).

    input_ids with -200, mask, labels, images  ->  embeds, mask, positions, labels of the fused rows

Our own way is model.py, which counts media and pads on the left. Here the quirks live: rows
without a picture eat one, spare pictures are ignored, rows are cut silently, padding goes where the
config says.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lapilli.compat.mm_utils import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Foreign,
    get_anyres_image_grid_shape,
)
from lapilli.compat.tower import (
    CLIPVisionTower,
    build_vision_projector,
    build_vision_tower,
    projector_config,
)
from lapilli.config.llava import ROUNDS_KEY, parse_pinpoints
from lapilli.config.model import ImageConfig, Merge, PixelConfig
from lapilli.config.projector import tile_features
from lapilli.errors import ConfigError
from lapilli.geometry import Grid, ImageSize
from lapilli.modality.image.modes import ImageMode, find_mode, mode_named
from lapilli.modality.image.modes.anyres import unpad_margins
from lapilli.shapes import Float, Int, Tensor

__all__ = [
    "LlavaMetaForCausalLM",
    "LlavaMetaModel",
    "get_anyres_image_grid_shape",
    "unpad_image",
]

Row = tuple[Float[Tensor, "_ D"], Int[Tensor, " _"]]
"""Embeddings and labels of one fused row, without padding."""
Prepared = tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]
Images = Tensor | Sequence[Tensor]
if TYPE_CHECKING:  # mixed into transformers' models, which have these

    class Base(nn.Module):
        base_model: Any
        config: Any
        generate: Any
        get_input_embeddings: Any
        get_output_embeddings: Any
        post_init: Any
        prepare_inputs_for_generation: Any
        resize_token_embeddings: Any

        def __init__(self, *config: Foreign) -> None: ...

else:
    Base = object


def unpad_image(
    tensor: Float[Tensor, "D H W"], original_size: Sequence[int]
) -> Float[Tensor, "D h w"]:
    """Return a feature map without what shows padding (quirk 18).

    `tensor` has its channels first; `original_size` is (width, height) of the picture.
    """
    height, width = tensor.shape[1:]
    size = ImageSize(original_size[1], original_size[0])
    margins = unpad_margins(size, Grid(height, width))
    return tensor[
        :, margins.rows : height - margins.rows, margins.columns : width - margins.columns
    ]


class LlavaMetaModel(Base):
    """Stack under the head, with the projector and the tower beside its layers."""

    def __init__(self, config: Foreign) -> None:
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)
            self._add_newline()

    def _add_newline(self) -> None:
        if "unpad" in (getattr(self.config, "mm_patch_merge_type", None) or ""):
            width = self.config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """Return the tower, or None for a model without pictures."""
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower

    def initialize_vision_modules(self, model_args: Foreign, fsdp: Foreign = None) -> None:
        """Put a tower and a projector beside the layers, as training begins.

        Args:
            model_args: `vision_tower`, `mm_vision_select_layer`, `mm_vision_select_feature`,
                `pretrain_mm_mlp_adapter`, `mm_patch_merge_type`, `mm_projector_type`.
            fsdp: taken and not needed: the tower is a module like any other.
        """
        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        tower = self.get_vision_tower() or build_vision_tower(model_args)
        tower.load_model()
        self.vision_tower = tower
        config.use_mm_proj = True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_hidden_size = tower.hidden_size
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = model_args.mm_patch_merge_type
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(config)
            self._add_newline()
        self.mm_projector.requires_grad_(True)
        if model_args.pretrain_mm_mlp_adapter is not None:
            weights = torch.load(model_args.pretrain_mm_mlp_adapter, "cpu", weights_only=True)
            parts = ((name.partition("mm_projector."), tensor) for name, tensor in weights.items())
            own = {name: tensor for (_, found, name), tensor in parts if found}
            self.mm_projector.load_state_dict(own)


class LlavaMetaForCausalLM(Base):
    """Mixin of the language models of the original: pictures between their tokens."""

    def get_model(self) -> Foreign:
        """Return the stack under the head, with `mm_projector` and `vision_tower`."""
        return self.base_model

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """Return the tower, or None for a model without pictures."""
        found: CLIPVisionTower | None = self.get_model().get_vision_tower()
        return found

    def encode_images(self, images: Images) -> Tensor:
        """Return projected features [N, patches, width]; no gradient reaches the tower."""
        model = self.get_model()
        features: Tensor = model.get_vision_tower()(images)
        like = next(model.mm_projector.parameters(), features)
        projected: Tensor = model.mm_projector(features.to(like.dtype))
        return projected

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Int[Tensor, "B L"],
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Foreign,
        labels: Int[Tensor, "B L"] | None,
        images: Images | None,
        image_sizes: Sequence[Sequence[int]] | None = None,
    ) -> Prepared:
        """Return (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels).

        What was None comes back as None. Without a tower, without images, or with a sequence of
        length 1 (taken for a decoding step, quirk 4) everything comes back as it came.

        Args:
            input_ids: -200 where a picture goes.
            position_ids: only whether they are given counts; rows are numbered from 0.
            attention_mask: False or 0 for padding, which is taken out; None: nothing is padding.
            past_key_values: passed through.
            labels: pictures get -100.
            images: [N, 3, H, W], or [N, tiles, 3, H, W], or a list of tensors.
            image_sizes: (width, height) of every picture, for the spatial merges.

        Raises:
            IndexError: fewer pictures than places and rows without one (quirks 3 and 4).
            NotImplementedError: start and end tokens with a tuned projector (quirk 17).
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features = self._features(images, image_sizes)
        if getattr(self.config, "tune_mm_mlp_adapter", False) and getattr(
            self.config, "mm_use_im_start_end", False
        ):
            raise NotImplementedError(
                "the original has no start and end tokens together with tune_mm_mlp_adapter: set "
                "one of them to false in the config, or use lapilli's own API"
            )
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        known = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        kept = zip(input_ids, known, real.bool(), strict=True)
        fused = self._fuse([(ids[keep], row[keep]) for ids, row, keep in kept], features)
        # Quirk 6: the end of a long row is lost, silently.
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        embeds, mask, positions, fused_labels = self._pad(
            [(row[:limit], known[:limit]) for row, known in fused]
        )
        return (
            None,
            None if position_ids is None else positions,
            None if attention_mask is None else mask.to(attention_mask.dtype),
            past_key_values,
            embeds,
            None if labels is None else fused_labels,
        )

    def _fuse(
        self, rows: Sequence[tuple[Tensor, Tensor]], features: Sequence[Tensor]
    ) -> Iterator[Row]:
        """Yield the rows with the features between their text.

        Note: quirk 3. A row without a picture uses one up all the same; quirk 4: what is left over
            at the end is ignored.
        """
        used = 0
        for ids, labels in rows:
            places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
            if used + max(len(places), 1) > len(features):
                raise IndexError(
                    f"there are only {len(features)} pictures: every <image> takes one, and so "
                    "does every row without <image> (give it a dummy picture)"
                )
            edges = [-1, *places, len(ids)]
            texts = [slice(a + 1, b) for a, b in pairwise(edges)]
            embeds = [self.get_input_embeddings()(ids[text]) for text in texts]
            known = [labels[text] for text in texts]
            for gap in range(len(places), 0, -1):
                item = features[used + gap - 1].to(embeds[0].device, embeds[0].dtype)
                embeds.insert(gap, item)
                known.insert(gap, labels.new_full((len(item),), IGNORE_INDEX))
            yield torch.cat(embeds), torch.cat(known)
            used += max(len(places), 1)

    def _pad(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return embeddings, mask, positions and labels of rows that were brought to one length.

        Note: quirk 5. The side is the config's, whatever side the input was padded on.
        """
        left = getattr(self.config, "tokenizer_padding_side", "right") == "left"
        embeds, labels = zip(*rows, strict=True)
        positions = [torch.arange(len(row), device=row.device) for row in embeds]
        real = [torch.ones_like(count, dtype=torch.bool) for count in positions]

        def padded(parts: Sequence[Tensor], fill: int) -> Tensor:
            side = "left" if left else "right"
            return pad_sequence(list(parts), True, fill, side)

        return (
            padded(embeds, 0),
            padded(real, 0),
            padded(positions, 0),
            padded(labels, IGNORE_INDEX),
        )

    def _features(
        self, images: Images, image_sizes: Sequence[Sequence[int]] | None
    ) -> Sequence[Float[Tensor, "_ D"]]:
        """Return one row of features per picture.

        Note: quirk 7. A stacked 4-d tensor is one tile per picture and never merged: it gets no
            newline, a list entry of one tile does.
        """
        if isinstance(images, Tensor) and images.ndim == 4:
            return list(self.encode_images(images))
        items = [image[None] if image.ndim == 3 else image for image in images]
        features = self.encode_images(torch.cat(items))
        tiles = torch.split(features, [len(item) for item in items])
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge == "flat":
            return [part.flatten(0, 1) for part in tiles]
        if not merge.startswith("spatial"):
            raise ValueError(
                f"mm_patch_merge_type is {merge!r}: expected flat, spatial or spatial_unpad"
            )
        return [self._merge(part, merge, index, image_sizes) for index, part in enumerate(tiles)]

    def _merge(
        self,
        tiles: Float[Tensor, "N P D"],
        merge: str,
        index: int,
        image_sizes: Sequence[Sequence[int]] | None,
    ) -> Float[Tensor, "n D"]:
        aspect = getattr(self.config, "image_aspect_ratio", "square")
        mode = find_mode(aspect) or mode_named("square")
        if len(tiles) > 1 and not mode.is_tiled:
            raise NotImplementedError(
                f"{len(tiles)} tiles of a picture with image_aspect_ratio {aspect!r}: anyres only"
            )
        if len(tiles) > 1 and image_sizes is None:
            raise TypeError(
                f"mm_patch_merge_type {merge!r} needs image_sizes, (width, height) of each picture"
            )
        width, height = image_sizes[index] if image_sizes is not None else (1, 1)
        stack = self.get_model()
        return mode.join(
            tiles,
            ImageSize(height, width),
            self._image_config(merge, mode),
            tile_features(stack.get_vision_tower().vision, projector_config(self.config)),
            newline=getattr(stack, "image_newline", None),
        )

    def _image_config(self, merge: str, mode: ImageMode) -> ImageConfig:
        """Return ours, as the attributes of the config say now."""
        kind: Merge = "spatial_unpad" if "unpad" in merge else "spatial"
        side = self.get_model().get_vision_tower().config.image_size
        pairs = getattr(self.config, "image_grid_pinpoints", None) if mode.is_tiled else None
        return ImageConfig(
            pixels=PixelConfig(crop_size=ImageSize(side, side)),
            aspect=mode.name,
            merge=kind,
            pinpoints=parse_pinpoints(pairs, width_first=True),
            rounds_unpad=bool(getattr(self.config, ROUNDS_KEY, False)),
        )

    def initialize_vision_tokenizer(self, model_args: Foreign, tokenizer: Foreign) -> None:
        """Add the tokens around pictures, and choose which embeddings training may change.

        The rows of new tokens begin as the mean of the old ones.

        Raises:
            ConfigError: an adapter file whose embeddings are neither two rows nor all.
        """
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
            self.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        ends = model_args.mm_use_im_start_end
        if ends:
            names = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
            new = tokenizer.add_tokens(names, special_tokens=True)
            self.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            average_new_rows(self, new)
            if model_args.pretrain_mm_mlp_adapter:
                weights = torch.load(model_args.pretrain_mm_mlp_adapter, "cpu", weights_only=True)
                _lay_rows(self.get_input_embeddings().weight, weights, new)
        if model_args.tune_mm_mlp_adapter and (ends or model_args.mm_use_im_patch_token):
            self.get_input_embeddings().requires_grad_(bool(ends))
            self.get_output_embeddings().requires_grad_(False)


def average_new_rows(model: Foreign, new: int) -> None:
    """Write the mean of the old rows into the last `new` rows of both embeddings."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if new:
            rows = module.weight.data
            rows[-new:] = rows[:-new].mean(dim=0, keepdim=True)


def _lay_rows(rows: Tensor, weights: Mapping[str, Tensor], new: int) -> None:
    given = weights["model.embed_tokens.weight"]
    if given.shape[0] not in (new, rows.shape[0]):
        raise ConfigError(
            f"the adapter file has embeddings of {given.shape[0]} tokens: expected the {new} new "
            f"ones or all {rows.shape[0]}"
        )
    if new:
        rows.data[-new:] = given[-new:].to(rows)
