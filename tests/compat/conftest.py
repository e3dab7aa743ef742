"""Tiny checkpoints of the golden specs, and the names of the original installed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lapilli import compat
from tests.conformance.checkpoints import load_maker

MakeCheckpoint = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    compat.install()


@pytest.fixture(scope="session")
def make_checkpoint(conformance: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Variant name -> {"model_path", "model_base", "vision"}; each is made once."""
    maker = load_maker(conformance)
    made: dict[str, dict[str, Any]] = {}

    def make(name: str) -> dict[str, Any]:
        if name not in made:
            spec = json.loads((conformance / "cases/open" / name / "spec.json").read_text())
            out = tmp_path_factory.mktemp(name)
            made[name] = maker.build(spec, str(out), None, str(conformance / "assets"))
        return made[name]

    return make


@pytest.fixture(scope="session")
def loaded(make_checkpoint: MakeCheckpoint) -> tuple[Any, Any, Any, int]:
    """(tokenizer, model, image_processor, context_len) of a llama checkpoint with `pad`."""
    from llava.model.builder import load_pretrained_model

    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    return load_pretrained_model(path, None, "llava-v1.5-tiny-pad", device="cpu")


@pytest.fixture
def picture() -> Image.Image:
    """A picture with something in it."""
    return Image.linear_gradient("L").resize((60, 40)).convert("RGB")
