"""`lapilli ask` and `lapilli chat` with checkpoints in AWQ and GPTQ, in every layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lapilli as package
from lapilli.checkpoint.export import export_checkpoint
from tests.checkpoint.published import awq, convert, gptq, of_text_layers
from tests.cli.conftest import Run

PEBBLE = Path(package.__file__).parent / "pebble"
PICTURE = str(PEBBLE.parents[2] / "examples" / "picture.png")
QUESTION = "How many objects are there?"
LLM_AWQ = {"backend": "llm-awq", "version": "gemv"}
# A block that a published LLaVA really has beside the right one, misspelt; it means nothing.
MISSPELT = {"quantizaion_config": {"quant_method": "awq", "bits": 3, "version": "none"}}


def chosen(name: str) -> bool:
    """All layers of the language model whose inputs are whole tiles of 64."""
    return of_text_layers(name) and "down_proj" not in name and "mm_projector" not in name


def add_to_config(path: Path, more: dict[str, object]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **more}))


def in_half(path: Path) -> None:
    """Everything that is not packed in float16, as published files have it."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        floats = {k: v.half() for k, v in tensors.items() if v.dtype == torch.float32}
        save_file(tensors | floats, file)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pebble as Hugging Face lays LLaVA out."""
    path = tmp_path_factory.mktemp("hf") / "llava"
    export_checkpoint("pebble", path, layout="huggingface")
    return path


def made_of(source: Path, folder: Path, kind: str) -> Path:
    if kind == "gptq":
        section = gptq(32)
    elif kind == "llm-awq":
        section = awq(32, modules_to_not_convert=None, **LLM_AWQ)
    else:
        section = awq(32, modules_to_not_convert=None)
    packed, _ = convert(source, folder, section, chosen=chosen)
    in_half(packed)
    if kind == "misspelt":
        add_to_config(packed, MISSPELT)
    if kind == "beside":
        config = json.loads((packed / "config.json").read_text())
        del config["quantization_config"]
        (packed / "config.json").write_text(json.dumps(config))
        section = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        (packed / "quant_config.json").write_text(json.dumps(section))
    return packed


KINDS = ["awq", "misspelt", "beside", "llm-awq", "gptq", "original", "original llm-awq"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_checkpoint_answers_and_talks(
    lapilli: Run, llava: Path, tmp_path: Path, kind: str
) -> None:
    """As the float checkpoint of the same rounded weights does."""
    source = PEBBLE if kind.startswith("original") else llava
    path = str(made_of(source, tmp_path / "made", kind.removeprefix("original ")))
    asked = lapilli("ask", QUESTION, PICTURE, "--model", path, "--device", "cpu")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.strip()
    lines = [QUESTION, "Is there a star?", f"/save {tmp_path / 'talk.json'}", "/quit"]
    talked = lapilli(
        "chat", PICTURE, "--model", path, "--device", "cpu", input="\n".join(lines) + "\n"
    )
    assert talked.returncode == 0, talked.stderr
    turns = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert turns[1]["text"] == asked.stdout.strip()
    chat = package.load(path, device="cpu")
    chat.ask(QUESTION, PICTURE)
    assert chat.ask("Is there a star?") == turns[3]["text"]
    floats = package.load(str(tmp_path / "made" / "float"), device="cpu")
    assert floats.ask(QUESTION, PICTURE) == turns[1]["text"]
