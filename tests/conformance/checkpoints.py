"""Checkpoints, tokenizers and pictures of a variant, made with the directory's own program."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL
from PIL import Image

from tests.conformance.cases import Variant
from tests.conformance.compare import SkipCase

RESAMPLED_BY = 13
"""Release of Pillow of the golden numbers, the first that resamples tall pictures as it does."""


def load_maker(root: Path) -> ModuleType:
    """make_checkpoint.py of a conformance directory, as a module."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", root / "make_checkpoint.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{root} has no make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """Inside, relative paths start at `path`."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


class Workshop:
    """What the cases of one variant stand on; each is made once, when first asked for."""

    def __init__(self, variant: Variant, maker: ModuleType, scratch: Path) -> None:
        self.variant = variant
        self._maker = maker
        self._scratch = scratch / variant.set / variant.name
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._made: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """make() the first time, its result afterwards."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def spec(self) -> dict[str, Any]:
        if self.variant.spec is None:
            raise ValueError(f"{self.variant.name} has no spec.json, so it has no checkpoint")
        return self.variant.spec

    @property
    def relative(self) -> bool:
        """mm_vision_tower is a relative path, which counts from the working directory."""
        return (self.variant.spec or {}).get("vision_path") == "relative"

    def checkpoint(self) -> dict[str, Any]:
        """Paths (`model_path`, `model_base`, `vision`) and `hashes`."""

        def make() -> dict[str, Any]:
            vision_path = self.spec["vision"]["dir"] if self.relative else None
            return self._maker.build(
                self.spec, str(self._scratch), vision_path, str(self.variant.assets)
            )

        return self.once("checkpoint", make)

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """The working directory in which a relative tower is found."""
        with working_directory(self._scratch if self.relative else Path.cwd()):
            yield

    def folder(self, name: str) -> Path:
        """A directory of its own under the scratch directory."""
        path = self._scratch / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def tokenizer_folder(self, given: dict[str, Any]) -> Path:
        """Tokenizer files as the README describes them: legacy, added, model_max_length, type."""
        settings = {k: v for k, v in given.items() if k != "fast"}
        settings = {"type": "llama", "set": self.variant.set, **settings}
        key = "tokenizer-" + repr(sorted(settings.items()))

        def make() -> Path:
            folder = self.folder(f"tokenizer{len(self._made)}")
            self._maker.write_tokenizer(settings, str(self.variant.assets), str(folder))
            return folder

        return self.once(key, make)

    def picture(self, name: str, *, convert: bool = True) -> Image.Image:
        """A golden picture, RGB unless `convert` is false.

        Raises:
            SkipCase: the picture is not here (photographs are not committed), or this Pillow reads
                other numbers out of it than the one that the golden numbers were made with.
        """
        path = self.variant.images / name
        if not path.exists():
            raise SkipCase(f"picture {name} is not here")
        image = Image.open(path)
        image.load()  # and close the file
        if image.height > image.width and int(PIL.__version__.partition(".")[0]) < RESAMPLED_BY:
            raise SkipCase(f"Pillow {PIL.__version__} resamples tall pictures in another order")
        return image.convert("RGB") if convert else image

    def pictures(self, names: list[str], *, convert: bool = True) -> list[Image.Image]:
        return [self.picture(name, convert=convert) for name in names]
