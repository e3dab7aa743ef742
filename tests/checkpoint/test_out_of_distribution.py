"""Out-of-distribution detector: known pictures and others, kept beside a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lapilli.checkpoint.out_of_distribution import fit_detector, load_detector, save_detector
from lapilli.errors import CheckpointError


def known_features(count: int, seed: int) -> list[torch.Tensor]:
    """Features with unequal spread and a mean away from zero."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3.0, 8)
    return [torch.randn(16, 8, generator=random) * scale + 2.0 for _ in range(count)]


def test_fresh_pictures_of_the_training_are_known_and_others_are_not() -> None:
    detector = fit_detector(known_features(400, seed=0), knows="shapes")
    inside = [detector.is_known(item) for item in known_features(100, seed=1)]
    assert sum(inside) >= 97
    assert not detector.is_known(torch.randn(16, 8) * 3.0 - 2.0)


def test_average_distance_of_known_pictures_is_one() -> None:
    known = known_features(400, seed=0)
    detector = fit_detector(known, knows="shapes")
    mean = torch.tensor([detector.distance(item) for item in known]).mean()
    torch.testing.assert_close(mean, torch.tensor(1.0), atol=0.05, rtol=0.0)


def test_limit_leaves_the_share_inside() -> None:
    detector = fit_detector(known_features(2000, seed=0), knows="shapes", share=0.9)
    inside = sum(detector.is_known(item) for item in known_features(500, seed=3))
    assert 430 <= inside <= 470


def test_what_lies_between_two_classes_is_unknown() -> None:
    drawings, letters = known_features(200, seed=0), known_features(200, seed=1)
    known = [*drawings, *(item + 6.0 for item in letters)]
    between = known_features(1, seed=2)[0] + 3.0
    assert fit_detector(known, knows="shapes").is_known(between)
    detector = fit_detector(known, knows="shapes", classes=[0] * 200 + [1] * 200)
    assert not detector.is_known(between)
    fresh = [*known_features(50, seed=3), *(item + 6.0 for item in known_features(50, seed=4))]
    assert sum(detector.is_known(item) for item in fresh) >= 96


def test_an_answer_of_little_probability_is_doubted() -> None:
    detector = fit_detector(known_features(50, seed=0), knows="shapes", unsure_below=0.5)
    assert detector.doubt(0.5, "pebble") is None
    assert detector.doubt(0.31, "pebble") == (
        "pebble is not sure of this answer: it gave it a probability of 31%."
    )
    assert fit_detector(known_features(50, seed=0), knows="shapes").doubt(0.0, "pebble") is None


def test_a_detector_of_one_class_may_leave_the_classes_out(tmp_path: Path) -> None:
    detector = fit_detector(known_features(50, seed=0), knows="shapes")
    save_detector(detector, tmp_path)
    tensors = {"mean": detector.mean[0], "whitening": detector.whitening[0].contiguous()}
    save_file(tensors, tmp_path / "world.safetensors")
    again = load_detector(tmp_path, width=8)
    item = known_features(1, seed=5)[0]
    assert again is not None
    assert again.distance(item) == detector.distance(item)


@pytest.mark.parametrize("classes", [None, [0, 0, 1, 1, 1] * 10])
def test_a_saved_detector_is_the_same(tmp_path: Path, classes) -> None:
    detector = fit_detector(
        known_features(50, seed=0), knows="shapes", classes=classes, unsure_below=0.25
    )
    save_detector(detector, tmp_path)
    again = load_detector(tmp_path)
    assert again is not None
    assert (again.knows, again.limit) == (detector.knows, detector.limit)
    assert again.unsure_below == 0.25
    item = known_features(1, seed=5)[0]
    assert again.distance(item) == detector.distance(item)


def test_a_checkpoint_without_the_files_has_none(tmp_path: Path) -> None:
    assert load_detector(tmp_path) is None


def test_one_of_the_two_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text('{"knows": "shapes", "limit": 1.0}')
    with pytest.raises(CheckpointError, match=r"world\.json and world\.safetensors"):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    ("said", "mean", "whitening"),
    [
        ({"limit": float("nan")}, [8], [8, 8]),
        ({"limit": "far"}, [8], [8, 8]),
        ({}, [8], [8, 8]),
        ({"limit": 1.0}, [7], [8, 8]),
        ({"limit": 1.0}, [8, 1], [8, 8]),
        ({"limit": 1.0}, [9], [9, 9]),
        ({"limit": 1.0}, [2, 8], [3, 8, 8]),
        ({"limit": 1.0}, [0, 8], [0, 8, 8]),
        ({"limit": 1.0, "unsure_below": 2.0}, [8], [8, 8]),
    ],
)
def test_files_that_are_no_detector_are_an_error(tmp_path, said, mean, whitening) -> None:
    (tmp_path / "world.json").write_text(json.dumps({"knows": "shapes", **said}))
    tensors = {"mean": torch.zeros(mean), "whitening": torch.zeros(whitening)}
    save_file(tensors, tmp_path / "world.safetensors")
    with pytest.raises(CheckpointError, match=r"world\.json and world\.safetensors"):
        load_detector(tmp_path, width=8)


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text('{"knows": "shapes", "limit": 1.0}')
    (tmp_path / "world.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"world\.json and world\.safetensors"):
        load_detector(tmp_path)
