"""The examples run as they are, as somebody would run them."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import lapilli
from tests.conformance.cases import find_variants
from tests.conformance.checkpoints import Workshop, load_maker
from tests.serve.conftest import picture, serving

# What the seed's notebook prints, in its order.
SEED_SHAPES = [
    [1, 595],
    [1, 3, 336, 336],
    [1, 595, 4096],
    [1, 576, 1024],
    [1, 576, 4096],
    [1, 595, 4096],
    [1, 595, 4096],
    [1, 595, 4096],
]


def run(repository: Path, name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(repository / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def model(conformance: Path, tmp_path_factory) -> str:
    [variant] = [v for v in find_variants(conformance) if v.name == "llava-v1.6-vicuna-tiny-336"]
    shop = Workshop(variant, load_maker(conformance), tmp_path_factory.mktemp("golden"))
    return shop.checkpoint()["model_path"]


@pytest.fixture(scope="module")
def drawing(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "drawing.png"
    Image.new("RGB", (90, 50), "tomato").save(path)
    return str(path)


def test_every_example_is_tested(repository: Path):
    names = {path.name for path in (repository / "examples").glob("*.py")}
    assert names == {
        *("01_ask.py", "02_batch.py", "03_forward_pass.py", "05_add_a_modality.py"),
        *("boxes.py", "gradio_chat.py", "tiny_llama.py"),
    }


def test_the_guide_shows_the_recipe_of_the_boxes(repository: Path):
    """boxes.py and boxes.toml run in tests/docs, as the guide's page says."""
    recipe = (repository / "examples" / "boxes.toml").read_text("utf-8")
    page = (repository / "docs" / "guide" / "train.md").read_text("utf-8")
    assert f"```toml\n{recipe.partition(chr(10))[2]}```" in page


@pytest.mark.slow
def test_ask(repository: Path, model: str, drawing: str):
    assert len(run(repository, "01_ask.py", model, drawing).strip()) > 20


@pytest.mark.slow
def test_without_arguments_pebble_answers(repository: Path):
    first, second = run(repository, "01_ask.py").splitlines()
    assert first
    assert second
    assert len(run(repository, "02_batch.py").splitlines()) == 3


@pytest.mark.slow
def test_a_modality_of_ones_own_is_learned(repository: Path, tmp_path: Path):
    source = (repository / "examples" / "05_add_a_modality.py").read_text("utf-8")
    assert len(source.splitlines()) <= 60
    assert run(repository, "05_add_a_modality.py", str(tmp_path)).split() == ["green", "red"]


@pytest.mark.slow
def test_batch(repository: Path, model: str, drawing: str):
    out = run(repository, "02_batch.py", model, drawing)
    assert len(re.findall(r"  ->  ", out)) == 3
    assert len(re.findall(r"\(log-probability -\d+\.\d\d\)", out)) == 3


@pytest.mark.slow
def test_forward_pass_prints_the_shapes_of_the_seed(repository: Path):
    out = run(repository, "03_forward_pass.py")
    printed = [
        [int(side) for side in shape.split(",")]
        for shape in re.findall(r"torch\.Size\(\[([\d, ]+)\]\)", out)
    ]
    assert printed == SEED_SHAPES
    assert "Linear(in_features=1024, out_features=4096, bias=True)" in out
    assert out.endswith("True\n")


@pytest.mark.slow
def test_the_chat_of_gradio_answers(repository: Path, tmp_path: Path, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("openai", reason="openai is not installed")
    path = tmp_path / "circle.png"
    path.write_bytes(picture("red"))
    with serving(lapilli.load("pebble")) as client:
        monkeypatch.setattr(sys, "argv", ["gradio_chat.py", f"{client.base_url}/v1"])
        answer = runpy.run_path(str(repository / "examples" / "gradio_chat.py"))["answer"]
        first = {"text": "What color is the circle?", "files": [str(path)]}
        *_, last = answer(first, [])
        assert last.strip() == "red"
        # As Gradio hands a conversation on: of its page, and of a program that asks it.
        file = {"path": str(path)}
        for shown, said in (
            ([{"type": "file", "file": file}, {"type": "text", "text": first["text"]}], [last]),
            ([file, first["text"]], last),
        ):
            history = [
                {"role": "user", "content": shown},
                {"role": "assistant", "content": said},
            ]
            *_, again = answer({"text": "What color is the circle?", "files": []}, history)
            assert again.strip() == "red"
