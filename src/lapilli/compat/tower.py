"""Image processor, vision tower and projector of the original, over transformers and ours.

CLIPImageProcessor               the one of transformers that works with Pillow, as the original's
CLIPVisionTower                  pixels -> features of the selected layer, without gradients
  .vision_tower                  VisionModel: transformers' CLIP or SigLIP, parameters named
                                 vision_model.* in every release
build_vision_projector(config)   lapilli.modality.projector
"""

# The types of transformers differ from release to release, and no release has all of them.
# mypy: allow-untyped-calls, allow-subclassing-any
# mypy: disable-error-code="arg-type,override,misc,assignment"

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

from lapilli.checkpoint.source import find_directory
from lapilli.checkpoint.write.llava import write_preprocessor_config, write_tower_config
from lapilli.compat import present
from lapilli.compat.mm_utils import Foreign
from lapilli.config.model import PixelConfig, ProjectorConfig, VisionConfig
from lapilli.config.projector import parse_projector
from lapilli.config.reader import KeyReader
from lapilli.config.vision import parse_tower
from lapilli.errors import ConfigError, MediaError
from lapilli.modality.image.decode import as_rgb
from lapilli.modality.projector import build_projector
from lapilli.shapes import Float, Tensor

try:  # transformers calls it by another name since it has two of them
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Base
except ImportError:
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor as Base


class CLIPImageProcessor(Base):
    """Image processor of one tile per picture; its options are those of transformers."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        # As programs for the original read them, and as its preprocessor_config.json has them.
        for name in ("size", "crop_size"):
            sizes = dict(getattr(self, name))
            setattr(self, name, {key: value for key, value in sizes.items() if value is not None})
        self.image_mean, self.image_std = list(self.image_mean), list(self.image_std)

    @classmethod
    def of(cls, pixels: PixelConfig) -> "CLIPImageProcessor":
        """Return the processor of a vision tower that lapilli has read."""
        written = write_preprocessor_config(pixels)
        written.pop("image_processor_type")
        return cls(**written)

    def preprocess(self, images: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        """Return `pixel_values` of one picture or of a list of them.

        Raises:
            MediaError: no pictures, or one that the original cannot read either (quirk 15).
        """
        listed = list(images) if isinstance(images, Sequence) else [images]
        if not listed:
            raise MediaError("no pictures to preprocess: the list is empty")
        shown = [_as_it_is_seen(one) for one in listed]
        return super().preprocess(shown, *args, **options)


def _as_it_is_seen(image: Any) -> Any:  # noqa: ANN401
    """Return the picture that the original's processor works on.

    Note: later releases lay a transparent picture on white, the original drops the transparency.
        Quirk 15: the processor takes an array whose first axis is 1 or 3 for channel-first, so a
        picture 3 pixels high is scrambled and one 1 pixel high has one channel and is refused.
    """
    if not isinstance(image, Image.Image):
        return image
    image = as_rgb(image)
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]
    if image.height not in (1, 3):
        return image
    if image.height == 1:
        raise MediaError(
            f"a picture of {image.width}x1 pixels: the original takes its only row for its only "
            "channel and fails; lapilli's own API reads it"
        )
    values = np.asarray(image).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(values))


def filled(kind: Any, config: Foreign, state: Mapping[str, Tensor]) -> Foreign:  # noqa: ANN401
    """Return a model of transformers around tensors that have been read already."""
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        dtype = next(iter(state.values())).dtype
        return kind.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype)
    finally:
        if shows_bars:
            logging.enable_progress_bar()


class VisionModel(PreTrainedModel):
    """Tower of transformers under the parameter names of published checkpoints.

    Releases up to 5.0 have `vision_model` inside of CLIPVisionModel, later ones have not.
    """

    config_class = CLIPVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    _supports_sdpa = True
    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012

    def __init__(self, config: Foreign) -> None:
        super().__init__(config)
        kind = SiglipVisionModel if "siglip" in config.model_type else CLIPVisionModel
        inner = kind(config)
        self.vision_model = getattr(inner, "vision_model", inner)
        self.post_init()

    def forward(self, pixel_values: Float[Tensor, "N C H W"], **options: Foreign) -> Foreign:
        """Return what transformers' tower returns; see its options there."""
        return self.vision_model(pixel_values, **options)


def vision_config(vision: VisionConfig) -> Foreign:
    """Return our description of a tower as transformers has it."""
    written = write_tower_config(vision, "float32")
    for name in ("architectures", "model_type", "torch_dtype"):
        written.pop(name)
    if vision.family == "siglip":
        return SiglipVisionConfig(**written, vision_use_head=False)
    return CLIPVisionConfig(**written)


class CLIPVisionTower(nn.Module):
    """Vision tower: pixels -> features of the selected layer, always without gradients.

    Args:
        vision_tower: a directory or a hub id.
        args: config or training arguments with `mm_vision_select_layer` and
            `mm_vision_select_feature`.
        delay_load: leave the tower out until `load_model`; its sizes are known all the same.
    """

    def __init__(self, vision_tower: str, args: Foreign, delay_load: bool = False) -> None:
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self.beside = Path(getattr(args, "_name_or_path", None) or ".")
        if getattr(args, "unfreeze_mm_vision_tower", False):
            # Its weights come with the checkpoint that is being loaded.
            self.vision_tower = VisionModel(self._published_config())
        elif not delay_load:
            self.load_model()

    @property
    def source(self) -> str:
        """Return where the tower is: a directory, or the hub id that it was named by."""
        found = find_directory(self.vision_tower_name, beside=(self.beside,))
        return str(found or self.vision_tower_name)

    def _published_config(self) -> Foreign:
        config = AutoConfig.from_pretrained(self.source)
        return getattr(config, "vision_config", config)

    def load_model(self, device_map: Foreign = None) -> None:
        """Read the tower where it is not there yet, and its image processor."""
        if self.is_loaded:
            return
        self.image_processor = CLIPImageProcessor.from_pretrained(self.source)
        if not hasattr(self, "vision_tower"):
            config = self._published_config()
            kind = SiglipVisionModel if "siglip" in config.model_type else CLIPVisionModel
            placed = {} if device_map in (None, "auto") else {"device_map": present(device_map)}
            read = kind.from_pretrained(self.source, config=config, dtype=torch.float32, **placed)
            self.adopt(config, read.state_dict())
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def adopt(
        self, config: Foreign, state: Mapping[str, Tensor], pixels: PixelConfig | None = None
    ) -> None:
        """Take weights that have been read already, without a copy.

        Args:
            config: of transformers' tower.
            state: by the names of a tower of its own, with or without `vision_model.`.
            pixels: what the image processor does; None: it is there already.
        """
        stem = "vision_model."
        named = {stem + name.removeprefix(stem): tensor for name, tensor in state.items()}
        self.vision_tower = filled(VisionModel, config, named)
        # Not stored, and not filled in every release: it would be whatever the memory holds.
        places = self.vision_tower.vision_model.embeddings.position_ids
        places.copy_(torch.arange(places.shape[-1], device=places.device))
        self.vision_tower.requires_grad_(False)
        if pixels is not None:
            self.image_processor = CLIPImageProcessor.of(pixels)
        self.is_loaded = True

    def feature_select(self, image_forward_outs: Foreign) -> Float[Tensor, "N P E"]:
        """Return the features that the projector reads, of all hidden states.

        Raises:
            ValueError: an unknown mm_vision_select_feature.
        """
        return self._selected(image_forward_outs.hidden_states[self.select_layer])

    def _selected(self, features: Tensor) -> Float[Tensor, "N P E"]:
        if self.select_feature == "cls_patch":
            return features
        if self.select_feature not in ("patch", "drop_first"):
            raise ValueError(
                f"mm_vision_select_feature is {self.select_feature!r}: expected patch or cls_patch"
            )
        has_class = "siglip" not in self.config.model_type
        return features[:, 1:] if has_class or self.select_feature == "drop_first" else features

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "N C H W"] | Sequence[Float[Tensor, "C H W"]]
    ) -> Tensor | list[Tensor]:
        """Return features [N, patches, width]; of a list, one [1, patches, width] per picture.

        Note: the features have the type of the pixels, as in the original, where that is the wider
            one. The original returns half features of half pixels from a float32 tower as well,
            which its float32 projector cannot take.

        Raises:
            MediaError: pixels of another size than the tower's.
        """
        if not isinstance(images, Tensor):
            return [self.forward(image[None]) for image in images]
        side = self.config.image_size
        if tuple(images.shape[-2:]) != (side, side):
            raise MediaError(
                f"pixels of {images.shape[-2]}x{images.shape[-1]}: the tower takes {side}x{side}; "
                "process_images() makes them so"
            )
        pixels = images.to(self.device, self.dtype)
        features = self._selected(self.hidden_states(pixels, [self.select_layer])[0])
        wider = torch.promote_types(images.dtype, self.dtype) == images.dtype
        return features.to(images.dtype) if wider else features

    def hidden_states(
        self, pixels: Float[Tensor, "N C H W"], layers: Sequence[int]
    ) -> list[Float[Tensor, "N P E"]]:
        """Return hidden states by number, with a class token where there is one, by own hooks.

        Those of transformers that collect the language model's states reach into the tower.
        """
        inside = self.vision_tower.vision_model.encoder.layers
        seen: dict[int, Any] = {}

        def hook(at: int) -> Foreign:
            if at == 0:
                return inside[0].register_forward_pre_hook(
                    lambda _, given: seen.__setitem__(at, given[0])
                )
            return inside[at - 1].register_forward_hook(
                lambda _, __, made: seen.__setitem__(at, made)
            )

        numbers = [layer % (len(inside) + 1) for layer in layers]
        hooks = [hook(at) for at in dict.fromkeys(numbers)]
        try:
            self.vision_tower(pixels)
        finally:
            for one in hooks:
                one.remove()
        found = [seen[at] for at in numbers]
        return [one[0] if isinstance(one, tuple) else one for one in found]

    @property
    def config(self) -> Foreign:
        """Return the sizes of the tower, before it is loaded too."""
        return (
            self.vision_tower.config if hasattr(self, "vision_tower") else self._published_config()
        )

    @property
    def vision(self) -> VisionConfig:
        """Return our description of the tower."""
        reader = KeyReader(self.config.to_dict(), self.vision_tower_name)
        return parse_tower(
            reader, feature_layer=self.select_layer, feature_select=self.select_feature
        )

    @property
    def dtype(self) -> torch.dtype:
        """Return the floating type of the weights."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.vision_tower.device

    @property
    def dummy_feature(self) -> Float[Tensor, "1 E"]:
        """Return zeros of one feature."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """Return the width of a feature."""
        return int(self.config.hidden_size)

    @property
    def num_patches_per_side(self) -> int:
        """Return the number of patches in one row of a tile."""
        return int(self.config.image_size // self.config.patch_size)

    @property
    def num_patches(self) -> int:
        """Return the number of patches of a tile, without a kept class token as in the original."""
        return self.num_patches_per_side**2


def build_vision_tower(vision_tower_cfg: Foreign, **options: bool) -> CLIPVisionTower:
    """Return the tower that a config or training arguments name.

    Raises:
        ConfigError: none is named.
    """
    config = vision_tower_cfg
    name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
    if not name:
        raise ConfigError("mm_vision_tower is not set: name the directory or hub id of a CLIP")
    return CLIPVisionTower(name, args=config, **options)


def projector_config(config: Foreign) -> ProjectorConfig:
    """Return our description of the projector that a config names."""
    return parse_projector(
        getattr(config, "mm_projector_type", None) or "linear",
        vision_size=config.mm_hidden_size,
        hidden_size=config.hidden_size,
    )


def build_vision_projector(config: Foreign, delay_load: bool = False, **_: object) -> nn.Module:
    """Return a fresh projector.

    The config has `mm_projector_type`, `mm_hidden_size` and `hidden_size`.

    Raises:
        ConfigError: an unknown type.
    """
    return build_projector(projector_config(config))
