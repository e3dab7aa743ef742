"""Text ids and pictures -> embeddings, exactly as the original does it (llava.model.llava_arch).

    input_ids with -200, mask, labels, images  ->  embeds, mask, positions, labels of the fused rows

Our own way is model/vlm.py, which counts media and pads on the left. Here the quirks live: rows
without a picture eat one, spare pictures are ignored, rows are cut silently, padding goes where the
config says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lapilli.compat.configuration import LlavaConfig
from lapilli.compat.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from lapilli.compat.foreign import Foreign
from lapilli.compat.mm_utils import read_pinpoints
from lapilli.compat.tower import CLIPVisionTower
from lapilli.config.model import ImageConfig, Merge
from lapilli.geometry import ImageSize
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.merge import merge_tiles
from lapilli.shapes import Float, Int, Tensor

Prepared = tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]
Images = Tensor | Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One fused row, without padding."""

    embeds: Float[Tensor, "T D"]
    labels: Int[Tensor, " T"]

    def cut(self, length: int | None) -> "Row":
        """The first `length` positions; quirk 6: the end is lost, silently."""
        return self if length is None else Row(self.embeds[:length], self.labels[:length])


class LlavaMetaForCausalLM(nn.Module):
    """What the language models of the original have in common: pictures between their tokens."""

    config: LlavaConfig

    def get_model(self) -> nn.Module:
        """The stack under the head, with `mm_projector` and `vision_tower`."""
        raise NotImplementedError

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """The tower, or None for a model without pictures."""
        return cast("CLIPVisionTower | None", getattr(self.get_model(), "vision_tower", None))

    def embed_tokens(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Vectors of token ids."""
        raise NotImplementedError

    @property
    def image_modality(self) -> ImageModality:
        """Ours, for its configuration."""
        raise NotImplementedError

    def encode_images(self, images: Images) -> Tensor:
        """Projected features [N, patches, width]; no gradient reaches the tower."""
        model = self.get_model()
        features = cast("nn.Module", model.vision_tower)(images)
        projected: Tensor = cast("nn.Module", model.mm_projector)(features)
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
        """(None, position_ids, attention_mask, past_key_values, inputs_embeds, labels).

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
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        rows = [row.cut(limit) for row in fused]
        embeds, mask, positions, fused_labels = self._pad(rows)
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
        """Rows with the features between their text.

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
            embeds = [self.embed_tokens(ids[text]) for text in texts]
            known = [labels[text] for text in texts]
            for gap in range(len(places), 0, -1):
                item = features[used + gap - 1].to(embeds[0].device, embeds[0].dtype)
                embeds.insert(gap, item)
                known.insert(gap, labels.new_full((len(item),), IGNORE_INDEX))
            yield Row(torch.cat(embeds), torch.cat(known))
            used += max(len(places), 1)

    def _pad(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeds, mask, positions and labels of rows of one length.

        Note: quirk 5. The side is the config's, whatever side the input was padded on.
        """
        left = getattr(self.config, "tokenizer_padding_side", "right") == "left"
        side = "left" if left else "right"
        device = rows[0].embeds.device
        positions = [torch.arange(len(row.labels), device=device) for row in rows]
        real = [torch.ones_like(count, dtype=torch.bool) for count in positions]

        def padded(parts: Sequence[Tensor], fill: int | float) -> Tensor:
            return pad_sequence(
                list(parts), batch_first=True, padding_value=fill, padding_side=side
            )

        return (
            padded([row.embeds for row in rows], 0.0),
            padded(real, 0),
            padded(positions, 0),
            padded([row.labels for row in rows], IGNORE_INDEX),
        )

    def _features(
        self, images: Images, image_sizes: Sequence[Sequence[int]] | None
    ) -> Sequence[Float[Tensor, "_ D"]]:
        """One row of features per picture.

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
        if len(tiles) > 1 and aspect != "anyres":
            raise NotImplementedError(
                f"{len(tiles)} tiles of a picture with image_aspect_ratio {aspect!r}: anyres only"
            )
        if len(tiles) > 1 and image_sizes is None:
            raise TypeError(
                f"mm_patch_merge_type {merge!r} needs image_sizes, (width, height) of each picture"
            )
        width, height = image_sizes[index] if image_sizes is not None else (1, 1)
        modality = self.image_modality
        return merge_tiles(
            tiles,
            ImageSize(height, width),
            self._image_config(modality.image, merge, aspect),
            modality.vision,
            newline=getattr(self.get_model(), "image_newline", None),
            projector=modality.projector_config,
        )

    def _image_config(self, image: ImageConfig, merge: str, aspect: str) -> ImageConfig:
        """Ours, as the attributes of the config say now."""
        kind: Merge = "spatial_unpad" if "unpad" in merge else "spatial"
        if aspect != "anyres":
            return replace(image, merge=kind)
        pairs = read_pinpoints(self.config.image_grid_pinpoints)
        sizes = tuple(ImageSize(height, width) for width, height in pairs)
        return replace(image, aspect="anyres", merge=kind, pinpoints=sizes)
