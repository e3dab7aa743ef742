"""A checkpoint with another projector: the old weights where they fit, fresh ones elsewhere."""

import pytest
import torch

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.out_of_distribution import detector_files
from lapilli.checkpoint.source import resolve
from lapilli.errors import CheckpointError, ConfigError, UnsupportedModelError
from lapilli.train.build import replace_projector

pytestmark = pytest.mark.slow


def state(source):
    return load_checkpoint(source, device="cpu", dtype="float32").model.state_dict()


def test_a_pooled_mlp_keeps_every_weight(tmp_path):
    assert replace_projector("pebble", tmp_path / "llava", projector="pool2x2_mlp2x_gelu") == ()
    before, after = state("pebble"), state(tmp_path / "llava")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = load_checkpoint(tmp_path / "llava")
    assert loaded.template.template.name == load_checkpoint("pebble").template.template.name
    # The tower is the same, so what it has seen still is.
    assert detector_files(tmp_path / "llava") == detector_files(resolve("pebble"))


def test_a_resampler_is_fresh_and_the_rest_stays(tmp_path):
    fresh = replace_projector("pebble", tmp_path / "llava", projector="resampler4", seed=3)
    assert "queries" in fresh
    before, after = state("pebble"), state(tmp_path / "llava")
    assert {name for name in after if "projector" in name} == {
        f"modalities.image.projector.{name}" for name in fresh
    }
    assert all(torch.equal(before[n], after[n]) for n in before if "projector" not in n)
    replace_projector("pebble", tmp_path / "same", projector="resampler4", seed=3)
    again = state(tmp_path / "same")
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_a_projector_that_does_not_fit_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ConfigError, match="3x3 neighbours of 8x8 patches"):
        replace_projector("pebble", tmp_path / "llava", projector="pool3x3_mlp2x_gelu")
    with pytest.raises(UnsupportedModelError, match="'qformer' is not supported"):
        replace_projector("pebble", tmp_path / "llava", projector="qformer")
    assert list(tmp_path.iterdir()) == []
    replace_projector("pebble", tmp_path / "llava", projector="mlp2x_gelu_pool2x2")
    with pytest.raises(CheckpointError, match="is there already"):
        replace_projector("pebble", tmp_path / "llava", projector="mlp2x_gelu_pool2x2")
