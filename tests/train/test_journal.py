import io
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from rich.console import Console

from lapilli.errors import ConfigError
from lapilli.train.log import RunLog
from lapilli.train.loop import train
from lapilli.train.plot import evaluation_curve, loss_curve
from lapilli.train.progress import ProgressBar
from lapilli.train.tracker import open_trackers
from tests.train.conftest import new_recipe, new_regression
from tests.train.faults import new_noisy, noisy_recipe


def test_the_bar_shows_loss_speed_memory_and_time_left():
    file = io.StringIO()
    bar = ProgressBar(2, 10, "align", console=Console(file=file, force_terminal=True, width=200))
    bar.tick({"step": 3, "loss": 1.23456, "gib": 2.04}, 100)
    bar.tick({"step": 4, "loss": 1.13456, "gib": 2.04}, 100)
    bar.close()
    shown = file.getvalue()
    for part in ("align", "4/10", "loss 1.1346", "tokens/s", "2.0 GiB", "left"):
        assert part in shown


def test_a_run_shows_its_bar_on_standard_error_alone(tmp_path, capfd):
    train(new_regression(), new_recipe(), tmp_path / "shown", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "12/12" in err
    train(new_regression(), new_recipe(), tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    train(new_regression(), new_recipe(steps=2), tmp_path / "lines", echo=True)
    assert [line.split("  ")[0] for line in capfd.readouterr().err.splitlines()] == [
        "step 1",
        "step 2",
    ]


def test_every_record_says_speed_and_memory(tmp_path, regression):
    train(regression, new_recipe(log_every=5), tmp_path)
    records = RunLog(tmp_path).records()
    assert [record["step"] for record in records] == [5, 10, 12]
    assert all(record["per_s"] > 0 and record["gib"] > 0.05 for record in records)


def test_the_curve_is_drawn_at_the_end(tmp_path):
    train(new_noisy(), noisy_recipe(steps=6, plot=True), tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    records = RunLog(tmp_path).records()
    assert [step for step, _ in loss_curve(records)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in evaluation_curve(records)] == [3, 6]


def test_a_log_that_is_whole_is_not_written_again(tmp_path):
    log = RunLog(tmp_path)
    log.write({"step": 1, "loss": 2.0})
    before = log.path.stat().st_ino
    log.rewind(1)
    assert log.path.stat().st_ino == before
    log.rewind(0)
    assert log.path.stat().st_ino != before
    assert log.records() == []


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    failing = new_regression(fails_at=7)
    recipe = new_recipe(loggers=("tensorboard",))
    with pytest.raises(RuntimeError):
        train(failing, recipe, tmp_path)
    train(new_regression(), recipe, tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in found.Scalars("loss")}
    expected = {r["step"]: pytest.approx(r["loss"]) for r in RunLog(tmp_path).records()}
    assert losses == expected
    assert "norm" in found.Tags()["scalars"]


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.records, self.ended, self.steps = settings, [], False, None

    def define_metric(self, name, *, step_metric):
        self.steps = (name, step_metric)

    def log(self, record):
        self.records.append(record)

    def finish(self):
        self.ended = True


def test_wandb_gets_the_log_as_one_run(tmp_path, monkeypatch):
    runs = []
    module = ModuleType("wandb")
    module.init = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    recipe = new_recipe(loggers=("wandb",), steps=4)
    train(new_regression(), recipe, tmp_path)
    longer = replace(recipe, run=replace(recipe.run, steps=6))
    train(new_regression(), longer, tmp_path)
    first, second = runs
    assert [record["step"] for record in first.records + second.records] == [1, 2, 3, 4, 5, 6]
    assert first.settings["id"] == second.settings["id"]
    assert first.settings["config"]["optim"]["lr"] == 0.01
    assert first.steps == ("*", "step")
    assert first.ended
    assert second.ended


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=f"asks for {name}, .* pip install {name}"):
        open_trackers(new_recipe(loggers=(name,)), tmp_path, 0)
