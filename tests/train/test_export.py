import json

import pytest
import torch

from lapilli.config.model import DecoderConfig, ProjectorConfig, VisionConfig
from lapilli.lm.decoder import Decoder
from lapilli.modality.image.vision import VisionTransformer
from lapilli.modality.projector import build_projector
from lapilli.pipeline import load
from lapilli.train.export import export_llava
from lapilli.train.pebble.words import corpus, train_tokenizer
from lapilli.train.plot import loss_curve, plot_losses

TEXT = DecoderConfig(
    vocab_size=500, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8, norm_eps=1e-5, rope_theta=1e4, max_positions=256,
)  # fmt: skip
VISION = VisionConfig(
    image_size=16, patch_size=8, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    train_tokenizer(corpus(1, 200), folder / "trained.model", TEXT.vocab_size)
    torch.manual_seed(0)
    parts = {
        "language_model": Decoder(TEXT),
        "projector": build_projector(
            ProjectorConfig(kind="mlp", depth=2, vision_size=8, hidden_size=16)
        ),
        "tower": VisionTransformer(VISION),
    }
    export_llava(
        folder / "model",
        **parts,
        text=TEXT,
        vision=VISION,
        tokenizer_model=(folder / "trained.model").read_bytes(),
    )
    return folder / "model", parts


def test_the_files_load_with_every_weight(exported):
    folder, parts = exported
    chat = load(str(folder), dtype="float32")
    assert not chat.report.missing
    assert not chat.report.unexpected
    own = dict(chat.model.named_parameters())
    prefixes = {
        "language_model": "language_model.",
        "projector": "modalities.image.projector.",
        "tower": "modalities.image.vision_tower.",
    }
    for name, part in parts.items():
        for key, value in part.state_dict().items():
            assert torch.equal(own[prefixes[name] + key], value.half().float()), key


def test_nothing_is_left_half_written_and_the_layout_is_the_originals(exported):
    folder, _ = exported
    assert not list(folder.rglob("*.part"))
    config = json.loads((folder / "config.json").read_text())
    assert config["mm_vision_tower"] == "vision_tower"
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert config["mm_vision_select_layer"] == -2
    assert config["image_aspect_ratio"] == "pad"


def test_loss_curves_become_a_picture(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 1, "colour": 0.5}, {"step": 2, "loss": 1.0}]
    assert loss_curve(records) == [(1, 2.0), (2, 1.0)]
    plot_losses({"one": loss_curve(records), "two": [(1, 3.0), (2, 2.0)]}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
