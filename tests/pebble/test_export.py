import json

import pytest
import torch

from lapilli.config.model import DecoderConfig, ProjectorConfig, VisionConfig
from lapilli.lm.decoder import Decoder
from lapilli.modality.image.image import VisionTransformer
from lapilli.modality.projector import build_projector
from lapilli.pipeline import load
from pebble.export import export_llava, llava_config
from pebble.words import corpus, train_tokenizer

TEXT = DecoderConfig(
    vocab_size=500, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8, norm_eps=1e-5, rope_theta=1e4, max_positions=256,
)  # fmt: skip
VISION = VisionConfig(
    image_size=16, patch_size=8, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
)


WEIGHTS = "model.safetensors"
TOKENIZER = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}


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


@pytest.mark.slow
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
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    tower = {f"vision_tower/{n}" for n in ("config.json", "preprocessor_config.json", WEIGHTS)}
    assert names == {"config.json", "generation_config.json", WEIGHTS, *TOKENIZER, *tower}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    config = json.loads((folder / "config.json").read_text())
    assert config["mm_vision_tower"] == "vision_tower"
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert config["mm_vision_select_layer"] == -2
    assert config["image_aspect_ratio"] == "pad"
    assert config["tune_mm_mlp_adapter"] is False
    assert config["pad_token_id"] == 0
    assert config["tokenizer_model_max_length"] == TEXT.max_positions


def test_other_files_of_the_folder_stay(exported, tmp_path):
    folder, parts = exported
    (tmp_path / "world.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    model = (folder / "tokenizer.model").read_bytes()
    export_llava(tmp_path, **parts, text=TEXT, vision=VISION, tokenizer_model=model)
    assert (tmp_path / "world.json").read_text() == "{}"
    assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_the_embedded_model_would_be_exported_with_the_config_that_it_has():
    embedded = load("pebble", device="cpu", dtype="float32").config
    again = llava_config(embedded.text, embedded.vision)
    for name in ("text", "vision", "projector", "image", "tokens", "max_length", "context_length"):
        assert getattr(again, name) == getattr(embedded, name), name
