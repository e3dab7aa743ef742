"""Data sets on disk, and a model of random weights that counts their pictures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    PixelConfig,
    ProjectorConfig,
    VisionConfig,
)
from lapilli.geometry import ImageSize
from lapilli.lm import build_language_model
from lapilli.modality.image.image import ImageModality
from lapilli.model import VisionLanguageModel
from lapilli.prompt.tokenizer import TokenizerFiles
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer
from pebble.words import corpus, train_tokenizer
from tests.prompt.conftest import Goldens


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(corpus(1, 200), path, 500)
    return SentencePieceTokenizer(TokenizerFiles(model=path.read_bytes()))


@pytest.fixture(scope="session")
def goldens(conformance: Path) -> Goldens:
    """The open set of golden cases."""
    return Goldens(conformance, "open")


@pytest.fixture(scope="session")
def model():
    return small_model(vocab_size=500)


def small_model(vocab_size):
    """A model that sees 28 x 28 pixels as 4 features."""
    side = ImageSize(28, 28)
    vision = VisionConfig(
        image_size=28,
        patch_size=14,
        hidden_size=8,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
    )
    pixels = PixelConfig(crop_size=side, shortest_edge=28)
    projector = ProjectorConfig(kind="linear", vision_size=8, hidden_size=8)
    modality = ImageModality(ImageConfig(pixels=pixels, aspect="pad"), vision, projector)
    text = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_positions=128,
    )
    return VisionLanguageModel(build_language_model(text), {"image": modality})


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)
    ]


RECORDS = [
    {
        "id": "one",
        "image": "red.png",
        "conversations": turns("<image>\nWhat is this?", "A red square.", "Sure?", "Yes."),
    },
    {"id": "none", "conversations": turns("Hello", "Hi, how can I help?")},
    {
        "id": "two",
        "image": ["red.png", "blue.png"],
        "conversations": turns("Which <image> is red?", "The first.", "And <image>", "Blue."),
    },
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """data.json beside its pictures."""
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    Image.new("RGB", (20, 40), "blue").save(tmp_path / "blue.png")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS, indent=1), encoding="utf-8")
    return tmp_path
