"""The model's configuration as an object whose attributes programs read and change."""

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from lapilli.compat.foreign import Foreign
from lapilli.config.model import ImageConfig, ModelConfig, ProjectorConfig


class LlavaConfig(SimpleNamespace):
    """The keys of config.json as attributes; an absent key is an absent attribute."""

    def to_dict(self) -> dict[str, Any]:
        """The keys and their values."""
        return dict(vars(self))

    def to_json_string(self) -> str:
        """The configuration as config.json has it."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def get(self, name: str, default: Foreign = None) -> Foreign:
        """An attribute, or `default` where it is absent."""
        return getattr(self, name, default)


def build_config(raw: Mapping[str, Any], config: ModelConfig) -> LlavaConfig:
    """The attributes of a checkpoint's config.json, and what every model has.

    Args:
        raw: config.json.
        config: what lapilli made of it. Checkpoints of other layouts than the original's get the
            `mm_` attributes that the original's functions read.
    """
    text = config.text
    sizes = {
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "vocab_size": text.vocab_size,
    }
    if config.layout == "llava":
        return LlavaConfig(**(dict(raw) | sizes))
    flat = {key: value for key, value in raw.items() if not isinstance(value, Mapping)}
    return LlavaConfig(**(flat | sizes | _mm_keys(config)))


def _mm_keys(config: ModelConfig) -> dict[str, Any]:
    if config.vision is None or config.image is None or config.projector is None:
        return {}
    keys: dict[str, Any] = {
        "mm_vision_tower": config.vision_source or "",
        "mm_hidden_size": config.vision.hidden_size,
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_select_feature": config.vision.feature_select,
        "mm_projector_type": _projector_type(config.projector),
        "mm_patch_merge_type": config.image.merge,
        "image_aspect_ratio": config.image.aspect,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    return keys | _pinpoints(config.image)


def _projector_type(projector: ProjectorConfig) -> str:
    return f"mlp{projector.depth}x_gelu" if projector.kind == "mlp" else projector.kind


def _pinpoints(image: ImageConfig) -> dict[str, Any]:
    if not image.pinpoints:
        return {}
    return {"image_grid_pinpoints": [[size.width, size.height] for size in image.pinpoints]}
