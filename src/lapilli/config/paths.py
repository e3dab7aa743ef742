"""Paths as people give them: `~` is a home, in every option, recipe and argument alike."""

import os
from pathlib import Path

from lapilli.config.reader import shown
from lapilli.errors import ConfigError


def given_path(name: str | os.PathLike[str]) -> Path:
    """Return the path that a person means; the `~` of a user who has no home stays as it is.

    Raises:
        ConfigError: neither text nor a path.
    """
    if not isinstance(name, str | os.PathLike):
        raise ConfigError(f"a path must be a text or a Path, got {shown(name)}")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)
