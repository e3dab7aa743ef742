"""A small LLaVA whose layers fit into every format, and calibration samples for it."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import LlamaConfig

from lapilli.calibration import CalibrationOptions, quantize_from_samples
from lapilli.calibration.builtin import builtin_text
from lapilli.quant import QuantConfig
from lapilli.quant.layerwise import LayerReport
from tests.integration.oracle import make_llava

COLOURS = ("red", "green", "blue", "white")
OWN, AWQ = {}, {"levels": "zeros", "head_bits": None, "value_bits": 4, "mode": "weight_only"}


def text_config(**changes: object) -> LlamaConfig:
    """The language model of the checkpoints here: three layers, 260 tokens."""
    sizes = {
        "vocab_size": 260, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA of random weights in Hugging Face's layout."""
    return str(make_llava(tmp_path_factory.mktemp("small") / "llava", text_config()).path)


def write_conversations(folder: Path, number: int = 4, *, pictures: bool = True) -> Path:
    """A file of conversations, one a line, and its pictures beside it."""
    lines = []
    for index in range(number):
        colour = COLOURS[index % len(COLOURS)]
        picture = Image.new("RGB", (30 + index, 28), "grey")
        ImageDraw.Draw(picture).rectangle((4, 4, 12 + index, 20), fill=colour)
        picture.save(folder / f"{index}.png")
        question = "Which colour is the square?"
        record = {"id": str(index), "conversations": [
            {"from": "human", "value": f"<image>\n{question}" if pictures else question},
            {"from": "gpt", "value": colour},
        ]}  # fmt: skip
        lines.append(json.dumps(record | ({"image": f"{index}.png"} if pictures else {})))
    path = folder / "conversations.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_conversations(tmp_path_factory.mktemp("conversations")))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of several blocks: more positions than any layer has inputs."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(builtin_text()[:6000], encoding="utf-8")
    return str(path)


def quantized(
    source: str, target: Path, options: dict[str, object], said: list[str] | None = None,
    *, overwrite: bool = False, **config: object,
) -> list[LayerReport]:  # fmt: skip
    """Run `quantize_from_samples` with keyword arguments of its options and of QuantConfig."""
    form = options.get("form", "lapilli")
    chosen = QuantConfig(**{**(OWN if form == "lapilli" else AWQ), **config})  # type: ignore[arg-type]
    return quantize_from_samples(
        source,
        target,
        chosen,
        CalibrationOptions(**options),  # type: ignore[arg-type]
        overwrite=overwrite,
        say=(lambda _text: None) if said is None else said.append,
    )
