"""Measured once per machine and shape; what is kept is used, what is damaged is measured again."""

from pathlib import Path

import pytest
import torch

from lapilli.quant.choose import PATHS, Choices, Shape, machine, time_path


class Clock:
    """A timer that counts its calls."""

    def __init__(self, **seconds: float) -> None:
        self.given = seconds
        self.calls: list[tuple[str, Shape]] = []

    def __call__(self, path: str, shape: Shape) -> float:
        self.calls.append((path, shape))
        return self.given[path]


SHAPE = (64, 32, 8)


def test_the_faster_float_wins_only_clearly() -> None:
    assert Choices(timer=Clock(float32=2.0, bfloat16=1.0)).float_dtype(SHAPE) == torch.bfloat16
    assert Choices(timer=Clock(float32=1.1, bfloat16=1.0)).float_dtype(SHAPE) == torch.float32


def test_a_second_process_measures_nothing(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "paths.json"
    clock = Clock(float32=2.0, bfloat16=1.0)
    first = Choices(file, clock)
    assert first.seconds(SHAPE, ("float32", "bfloat16")) == {"float32": 2.0, "bfloat16": 1.0}
    assert len(clock.calls) == 2
    again = Choices(file, clock)
    assert again.float_dtype(SHAPE) == torch.bfloat16
    assert len(clock.calls) == 2
    again.float_dtype((1, 2, 3))
    assert len(clock.calls) == 4
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
