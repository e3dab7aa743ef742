"""Measured once per machine and shape; what is kept is used, what is damaged is measured again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lapilli.config.model import VisionConfig
from lapilli.kernels.library import native
from lapilli.modality.image.image import VisionTransformer
from lapilli.nn.linear import FloatLinear
from lapilli.quant.autotune import (
    PATHS,
    Choices,
    Shape,
    machine,
    take_faster_layers,
    take_faster_products,
    time_path,
)


class Clock:
    """A timer that counts its calls."""

    def __init__(self, **seconds: float) -> None:
        self.given = seconds
        self.calls: list[tuple[str, Shape]] = []

    def __call__(self, path: str, shape: Shape) -> float:
        self.calls.append((path, shape))
        return self.given[path]


SHAPE = (64, 32, 8)


@pytest.mark.parametrize(
    ("seconds", "faster"),
    [
        ({"float32": 2.0, "onednn": 2.0, "bfloat16": 1.0}, torch.bfloat16),
        ({"float32": 1.1, "onednn": 1.1, "bfloat16": 1.0}, torch.float32),
        ({"float32": 2.0, "onednn": 1.0, "bfloat16": 1.0}, torch.float32),
    ],
)
def test_the_faster_float_wins_only_clearly(seconds: dict[str, float], faster: torch.dtype) -> None:
    assert Choices(timer=Clock(**seconds)).float_dtype(SHAPE) == faster


@pytest.mark.parametrize(("onednn", "by_onednn"), [(1.0, True), (1.9, False)])
def test_large_float_layers_take_the_faster_product(onednn: float, by_onednn: bool) -> None:
    model = nn.Sequential(
        nn.Linear(1024, 1024),
        nn.Sequential(nn.Linear(64, 64), nn.Linear(4096, 4096)),
        nn.Linear(1024, 1024, dtype=torch.bfloat16),
        nn.Linear(1024, 1024, dtype=torch.float64),
    )
    before = model.state_dict()
    clock = Clock(float32=2.0, onednn=onednn)
    assert take_faster_products(model, Choices(timer=clock)) == 3
    assert {shape for _, shape in clock.calls} == {(1024, 1024, 256), (2048, 2048, 256)}
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    changed = {n: m.by_onednn for n, m in model.named_modules() if isinstance(m, FloatLinear)}
    assert changed == {"0": by_onednn, "1.1": by_onednn, "2": False}


def test_a_second_process_measures_nothing(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "paths.json"
    clock = Clock(float32=2.0, onednn=2.0, bfloat16=1.0)
    first = Choices(file, clock)
    assert first.seconds(SHAPE, ("float32", "bfloat16")) == {"float32": 2.0, "bfloat16": 1.0}
    assert len(clock.calls) == 2
    again = Choices(file, clock)
    assert again.seconds(SHAPE, ("float32", "bfloat16")) == {"float32": 2.0, "bfloat16": 1.0}
    assert len(clock.calls) == 2
    again.float_dtype((1, 2, 3))
    assert len(clock.calls) == 5
    assert machine() in file.read_text()


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_damaged_file_is_measured_over(tmp_path: Path, content: str) -> None:
    file = tmp_path / "paths.json"
    file.write_text(content)
    clock = Clock(float32=1.0)
    assert Choices(file, clock).seconds(SHAPE, ("float32",)) == {"float32": 1.0}
    assert Choices(file, Clock()).seconds(SHAPE, ("float32",)) == {"float32": 1.0}


def test_nowhere_to_write_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file" / "paths.json", Clock(float32=1.0))
    assert choices.seconds(SHAPE, ("float32",)) == {"float32": 1.0}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_runs(path: str) -> None:
    assert 0 < time_path(path, (48, 64, 3)) < 60


@pytest.mark.parametrize(("seconds", "changed"), [(1.0, 2), (2.0, 0)])
def test_layers_of_a_tower_take_one_call_where_it_is_faster(seconds: float, changed: int) -> None:
    config = VisionConfig(
        image_size=14,
        patch_size=14,
        hidden_size=512,
        intermediate_size=2048,
        num_layers=2,
        num_heads=8,
    )
    with torch.device("meta"):
        tower = VisionTransformer(config)
    tower = tower.to_empty(device="cpu")
    clock = Clock(**{"modules float32 8": 2.0, "one call float32 8": seconds})
    assert take_faster_layers(tower, Choices(timer=clock)) == (0 if native() is None else changed)
    layers = tower.vision_model.encoder.layers
    assert sum(layer.fused.takes_floats for layer in layers) == (0 if native() is None else changed)


@pytest.mark.parametrize("path", ["modules float32 2", "one call bfloat16 2"])
def test_layers_of_a_tower_are_timed(path: str) -> None:
    assert time_path(path, (64, 32, 5)) > 0
