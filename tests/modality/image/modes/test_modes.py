"""The table of image modes: names, modes from outside, and that nobody else compares a name."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import lapilli
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.write.huggingface import check_hf_layout
from lapilli.compat.mm_utils import process_images
from lapilli.compat.tower import CLIPImageProcessor
from lapilli.config.model import ImageConfig, PixelConfig
from lapilli.errors import CheckpointError, ConfigError, UnsupportedModelError
from lapilli.geometry import ImageSize
from lapilli.modality.image import modes
from lapilli.modality.image.modes import find_mode, mode_named, mode_names, mode_of, register
from lapilli.train.build import Joint, build_llava
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import launch
from lapilli.train.recipe import (
    DataRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
)
from tests.checkpoint.published import make_llava
from tests.contributing import sample
from tests.integration.oracle import picture
from tests.modality.image.build import image_config
from tests.train.parts import Parts

SOURCES = Path(modes.__file__).resolve().parents[3]


@pytest.fixture
def halves(monkeypatch, tmp_path):
    """The mode of CONTRIBUTING.md, known during a test."""
    monkeypatch.setattr(modes, "_MODES", dict(modes._MODES))
    return register(sample("Add an image mode", tmp_path).MODE)


def names_compared(path: Path, names: tuple[str, ...]) -> list[str]:
    """Lines of a file that ask for a mode by its name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        asks = isinstance(node, ast.Compare | ast.MatchValue) or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith")
        )
        if asks and any(
            isinstance(part, ast.Constant) and part.value in names for part in ast.walk(node)
        ):
            found.append(f"{path.relative_to(SOURCES)}:{node.lineno}")
    return found


def test_nobody_else_compares_the_name_of_a_mode():
    inside = Path(modes.__file__).parent
    files = [path for path in SOURCES.rglob("*.py") if inside not in path.parents]
    assert len(files) > 100
    assert [line for path in files for line in names_compared(path, mode_names())] == []


def test_a_compared_name_would_be_found(monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "SOURCES", tmp_path)
    path = tmp_path / "a.py"
    path.write_text('x = image.aspect == "pad"\ny = name in ("a", "anyres")\nz = f("pad")\n')
    assert names_compared(path, mode_names()) == ["a.py:1", "a.py:2"]


def test_every_name_belongs_to_one_mode():
    assert set(mode_names()) == {"square", "pad", "anyres"}
    for name in mode_names():
        assert mode_named(name).name == name
        assert find_mode(name) is mode_named(name)
        keys = mode_named(name).llava_keys(28)
        assert keys["image_aspect_ratio"] == name
    assert find_mode(None) is None


def test_a_mode_that_there_is_not_is_named():
    config = ImageConfig(pixels=PixelConfig(crop_size=ImageSize(28, 28)), aspect="wide")
    with pytest.raises(UnsupportedModelError, match=r"'wide' is not supported, choose from .*pad"):
        mode_of(config)


def test_anyres_needs_resolutions():
    with pytest.raises(ConfigError, match="'anyres' but image_grid_pinpoints is empty"):
        mode_of(image_config(28, "anyres", pinpoints=()))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"image_aspect_ratio": "wide"}, UnsupportedModelError, "'wide' is not supported"),
        ({"image_aspect_ratio": "anyres"}, ConfigError, "image_grid_pinpoints is empty"),
    ],
)
def test_a_checkpoint_of_a_mode_that_cannot_be_followed_is_refused(tmp_path, changes, error, match):
    base, eyes = Parts(tmp_path)("llama", "clip")
    build_llava(base, eyes, tmp_path / "made")
    path = tmp_path / "made" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(error, match=match) as caught:
        load_checkpoint(tmp_path / "made", device="cpu")
    assert isinstance(caught.value, CheckpointError)


def test_the_mode_of_contributing(halves, tmp_path):
    """One file is all that it takes: to build, load, ask, train, save, and load again."""
    base, eyes = Parts(tmp_path, torch.float32)("llama", "clip")
    build_llava(base, eyes, tmp_path / "start", joint=Joint(aspect="halves"))
    chat = lapilli.load(str(tmp_path / "start"), device="cpu", dtype="float32", strict_config=True)
    assert isinstance(chat.ask("What?", picture(60, 40, 1), max_new_tokens=3), str)
    image = chat.model.modality("image")
    item = image.prepare(picture(60, 40, 1))
    assert len(item.pixel_values) == halves.num_tiles(item.size, image.image, 28) == 2
    assert image.num_tokens(item) == len(image.embed([item])[0]) == 2 * 4

    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A stone."}]
    samples = [{"id": "0", "image": "a.png", "conversations": turns}]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    recipe = Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=1e-2),
        run=RunRecipe(batch_size=1, steps=1, plot=False),
        model=ModelRecipe(checkpoint=str(tmp_path / "start")),
        data=DataRecipe(sources=(SourceRecipe(path=str(tmp_path / "train.json")),)),
    )
    launch(recipe, tmp_path / "run", parallel=SINGLE_PROCESS)
    saved = load_checkpoint(tmp_path / "run" / "model", device="cpu", dtype="float32")
    assert saved.config.image == chat.config.image
    before, after = chat.model.state_dict(), saved.model.state_dict()
    assert not torch.equal(
        before["modalities.image.projector.0.weight"], after["modalities.image.projector.0.weight"]
    )
    with pytest.raises(UnsupportedModelError, match=r"'halves' .*'flat', only .*pad with flat"):
        check_hf_layout(saved.config)


def test_compat_follows_the_mode_of_contributing(halves):
    config = SimpleNamespace(image_aspect_ratio=halves.name)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    pictures = [picture(60, 40, 1), picture(30, 90, 2)]
    expected = [halves.prepare(one, image_config(28, halves.name)).pixel_values for one in pictures]
    torch.testing.assert_close(
        process_images(pictures, processor, config), torch.stack(expected), atol=1e-5, rtol=0
    )


def test_the_layout_of_hugging_face_says_every_mode(tmp_path):
    for is_next in (False, True):
        make_llava(tmp_path / str(is_next), is_next=is_next)
        config = load_checkpoint(tmp_path / str(is_next), device="cpu").config
        check_hf_layout(config)
        assert mode_of(config.image).is_tiled == is_next
