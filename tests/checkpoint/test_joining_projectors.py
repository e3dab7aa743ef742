"""pebble with a projector that leaves fewer positions: saved, inspected, loaded and asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import lapilli
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.read.assemble import build_model
from lapilli.checkpoint.write.llava import save_llava, save_projector
from lapilli.config.projector import parse_projector, projector_name

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pebble():
    return load_checkpoint("pebble", device="cpu", dtype="float32")


def with_projector(loaded, name):
    """pebble with another projector: its own weights where they fit, fresh ones elsewhere."""
    wanted = parse_projector(name, vision_size=256, hidden_size=256)
    config = replace(loaded.config, projector=wanted)
    torch.manual_seed(0)
    model = build_model(config).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    own = loaded.model.state_dict()
    model.load_state_dict({n: t for n, t in own.items() if n in model.state_dict()}, strict=False)
    return model, config


@pytest.mark.parametrize(
    ("name", "positions"),
    [("pool2x2_mlp2x_gelu", 16), ("mlp2x_gelu_pool4x4", 4), ("resampler9x2", 9)],
)
def test_round_trip(pebble, tmp_path, name, positions):
    model, config = with_projector(pebble, name)
    path = tmp_path / "llava-short"
    save_llava(path, model, config, tokenizer_path=pebble.tokenizer_path, tower="beside")
    after = load_checkpoint(path, device="cpu", dtype="float32", strict_config=True)
    assert projector_name(after.config.projector) == name
    expected = model.state_dict()
    assert all(torch.equal(expected[n], t) for n, t in after.model.state_dict().items())
    inspection = inspect_checkpoint(path)
    assert set(inspection.visual_tokens.values()) == {positions}
    assert inspection.projector["features_per_tile"] == positions
    chat = lapilli.load(str(path))
    picture = Image.fromarray(np.full((60, 90, 3), 200, dtype=np.uint8))
    one = chat.ask("What is this?", picture, max_new_tokens=3)
    modality = after.model.modality("image")
    with torch.inference_mode():
        (features,) = modality.embed([modality.prepare(picture)])
    assert features.shape == (positions, 256)
    chat.reset()
    assert chat.ask("What is this?", features, max_new_tokens=3) == one


def test_projector_alone(pebble, tmp_path):
    model, config = with_projector(pebble, "resampler9")
    config = replace(config, vision_source=str(pebble.path / "vision_tower"))
    save_projector(tmp_path / "llava-projector", model, config, base=str(pebble.path))
    after = load_checkpoint(tmp_path / "llava-projector", device="cpu", dtype="float32")
    found, expected = after.model.state_dict(), model.state_dict()
    assert all(torch.equal(expected[n], t) for n, t in found.items())
