"""Image modes, one file each, by the name that `image_aspect_ratio` of a config.json has for them.

A file of this folder that has a `MODE` is one of them without being named anywhere else
(CONTRIBUTING.md, "Add an image mode").
"""

import pkgutil
from importlib import import_module

from lapilli.config.model import ImageConfig, ModelConfig
from lapilli.config.projector import tile_features
from lapilli.config.reader import shown
from lapilli.errors import UnsupportedModelError
from lapilli.geometry import ImageSize
from lapilli.modality.image.modes.base import ImageMode

__all__ = [
    "ImageMode",
    "find_mode",
    "mode_named",
    "mode_names",
    "mode_of",
    "num_tokens",
    "register",
]

_MODES: dict[str, ImageMode] = {}


def register(mode: ImageMode) -> ImageMode:
    """Make a mode known, in place of one of the same name, and return it."""
    _MODES[mode.name] = mode
    return mode


def mode_names() -> tuple[str, ...]:
    """Return the name of every mode."""
    return tuple(_MODES)


def find_mode(name: object) -> ImageMode | None:
    """Return the mode of a name, if there is one."""
    return _MODES.get(name) if isinstance(name, str) else None


def mode_named(name: str) -> ImageMode:
    """Return the mode of a name.

    Raises:
        UnsupportedModelError: lapilli has no such mode.
    """
    mode = find_mode(name)
    if mode is None:
        raise UnsupportedModelError(
            f"config.json: image_aspect_ratio {shown(name)} is not supported, "
            f"choose from {', '.join(_MODES)}"
        )
    return mode


def mode_of(config: ImageConfig) -> ImageMode:
    """Return the mode of a configuration that it can follow.

    Raises:
        ConfigError: the mode needs something that the configuration does not have.
        UnsupportedModelError: lapilli has no such mode.
    """
    mode = mode_named(config.aspect)
    mode.check(config)
    return mode


def num_tokens(size: ImageSize, config: ModelConfig) -> int:
    """Return the number of positions that a picture of a size takes in a model's prompts.

    Raises:
        ConfigError: the configuration cannot lay the features of such a picture out.
    """
    if config.image is None or config.vision is None:
        return 0
    tile = tile_features(config.vision, config.projector)
    mode = mode_of(config.image)
    has_newline = config.has_newline and mode.is_tiled
    return mode.num_tokens(size, config.image, tile, has_newline=has_newline)


for _module in pkgutil.iter_modules(__path__):
    _found = getattr(import_module(f"{__name__}.{_module.name}"), "MODE", None)
    if isinstance(_found, ImageMode):
        register(_found)
