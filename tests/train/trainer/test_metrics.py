"""What a run writes down of its metrics, and a loss that rises, which is told once."""

import io
import json
import math
import struct
import sys
import time
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from rich.console import Console

from lapilli.errors import ConfigError
from lapilli.train.trainer import metrics
from lapilli.train.trainer.loop import TrainingError, train
from lapilli.train.trainer.metrics import (
    LossWatch,
    ProgressBar,
    RunLog,
    advice,
    loss_curve,
    open_trackers,
    plot_losses,
    rise_record,
)
from lapilli.train.trainer.task import Loss
from tests.train.conftest import new_recipe, new_regression, steps_of
from tests.train.faults import new_noisy, noisy_recipe


def test_the_bar_shows_loss_speed_memory_and_time_left(monkeypatch):
    file, now = io.StringIO(), iter((10.0, 10.5))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    bar = ProgressBar(2, 10, "align", console=Console(file=file, force_terminal=True, width=200))
    bar.tick({"step": 3, "loss": 1.23456, "gib": 2.04}, 100)
    bar.tick({"step": 4, "loss": 1.13456, "gib": 2.04}, 700)
    monkeypatch.undo()
    bar.close()
    shown = file.getvalue()
    for part in ("align", "4/10", "loss 1.1346", "1,400 tokens/s", "2.0 GiB", "left"):
        assert part in shown


def test_a_run_shows_its_bar_on_standard_error_alone(tmp_path, capfd):
    train(new_regression(), new_recipe(), tmp_path / "shown", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "12/12" in err
    train(new_regression(), new_recipe(), tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    train(new_regression(), new_recipe(steps=2), tmp_path / "lines", echo=True)
    said = [line.split("  ")[:2] for line in capfd.readouterr().err.splitlines()]
    assert [start for start, what in said if what.startswith("loss")] == ["step 1", "step 2"]


def test_every_record_says_speed_and_memory(tmp_path, regression):
    train(regression, new_recipe(log_every=5), tmp_path)
    records = steps_of(tmp_path)
    assert [record["step"] for record in records] == [5, 10, 12]
    assert all(record["per_s"] > 0 and record["gib"] > 0.05 for record in records)


@pytest.mark.slow
def test_the_curve_is_drawn_at_the_end(tmp_path):
    train(new_noisy(), noisy_recipe(steps=6, plot=True), tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    records = RunLog(tmp_path).records()
    assert [step for step, _ in loss_curve(records)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in loss_curve(records, "eval_loss")] == [3, 6]


@pytest.mark.parametrize("name", ["$a_b_c$ \\frac{", "odd\udcff"])
def test_a_folder_may_be_called_anything(tmp_path, name):
    folder = tmp_path / name
    train(new_regression(), new_recipe(steps=2, plot=True), folder)
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_damaged_line_of_the_log_is_named(tmp_path):
    log = RunLog(tmp_path)
    log.write({"step": 1, "loss": 2.0})
    with log.path.open("ab") as file:
        file.write(b"\0\0\xff\n")
    log.write({"step": 2, "loss": 1.0})
    with pytest.raises(TrainingError, match=r"log.jsonl:2 is damaged .*: delete the line"):
        train(new_regression(), new_recipe(), tmp_path)


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
    expected = {r["step"]: pytest.approx(r["loss"]) for r in steps_of(tmp_path)}
    assert losses == expected
    assert "norm" in found.Tags()["scalars"]


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.records, self.ended = settings, [], False

    def log(self, record, *, step):
        self.records.append(record | {"step": step})

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_wandb_gets_the_log_as_one_run(tmp_path, monkeypatch):
    runs = []
    module = ModuleType("wandb")
    module.Error = RuntimeError
    module.init = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    recipe = new_recipe(loggers=("wandb",), steps=4)
    train(new_regression(), recipe, tmp_path)
    longer = replace(recipe, run=replace(recipe.run, steps=6, save_every=5))
    with pytest.raises(RuntimeError):
        train(new_regression(fails_at=5), longer, tmp_path)
    train(new_regression(), longer, tmp_path)
    records = [record for run in runs for record in run.records]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len({run.settings["id"] for run in runs}) == 1
    assert runs[0].settings["config"]["optim"]["lr"] == 0.01
    assert [run.exit_code for run in runs] == [0, 1, 0]


def test_wandb_that_does_not_start_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    def refuse(**settings):
        raise module.Error("No API key configured.")

    module = ModuleType("wandb")
    module.Error, module.init = RuntimeError, refuse
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match=r"No API key configured\. .* set WANDB_MODE=offline"):
        open_trackers(new_recipe(loggers=("wandb",)), tmp_path, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_wandb_keeps_one_run_in_two_folders(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = new_recipe(loggers=("wandb",), steps=5, evaluate_every=2)
    with pytest.raises(RuntimeError):
        train(new_regression(fails_at=4), recipe, tmp_path)
    train(new_regression(), recipe, tmp_path)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda at: at.stat().st_ctime)
    name = (tmp_path / "wandb_id").read_text()
    files = [folder / f"run-{name}.wandb" for folder in folders]
    # wandb writes in a process of its own, which may still be at it when `finish` has returned.
    deadline = time.monotonic() + 60
    while not history(files[-1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    starts = [history(file) for file in files]
    assert [list(rows) for rows in starts] == [[1, 2, 3, 4], [4, 5]]
    rows = starts[0] | starts[1]
    for record in RunLog(tmp_path).records():
        assert record.items() - {("step", record["step"])} <= rows[record["step"]].items()
    assert "training" in rows[2]
    assert "training" not in rows[1]


def history(file):
    """Rows of a run of wandb by step; records lie in blocks of 32 KiB, one after the other."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, rows = file.read_bytes(), 7, {}
    assert len(data) < 1 << 15
    while at < len(data):
        _, size, _ = struct.unpack("<IHB", data[at : at + 7])
        record = Record.FromString(data[at + 7 : at + 7 + size])
        row = {
            (item.key or item.nested_key[0]): json.loads(item.value_json)
            for item in record.history.item
        }
        if row:
            rows[row["_step"]] = row
        at += 7 + size
    return rows


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=f"asks for {name}, .* pip install {name}"):
        open_trackers(new_recipe(loggers=(name,)), tmp_path, 0)


def test_loss_curves_become_a_picture(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 1, "colour": 0.5}, {"step": 2, "loss": 1.0}]
    assert loss_curve(records) == [(1, 2.0), (2, 1.0)]
    plot_losses({"one": loss_curve(records), "two": [(1, 3.0), (2, 2.0)]}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def told(losses, steps=None, records=()):
    watch = LossWatch(steps or len(losses), records)
    return [step for step, loss in enumerate(losses, 1) if watch.push(loss)]


def test_a_loss_that_rises_is_told_once():
    rising = [5.7, 6.0, 7.1, 8.9, 9.8, *[10.7] * 25]
    assert len(told(rising)) == 1
    assert len(told([*np.linspace(5, 1, 100), *np.linspace(1, 6, 30)])) == 1
    assert len(told([5.7, 8.0, 9.9, *[10.7] * 12])) == 1  # a run of fifteen steps


@pytest.mark.parametrize(
    ("mean", "spread"), [(0.1, 0.8), (1.0, 0.2), (1.0, 0.8), (3.0, 0.2), (3.0, 0.4)]
)
def test_noise_is_not_a_rise(mean, spread):
    """Single samples whose losses lie far apart, and no trend."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        losses = mean * np.exp(spread * rng.standard_normal(100) - spread * spread / 2)
        assert told(losses.tolist()) == []


def test_losses_that_jump_about_while_they_rise_are_a_rise():
    """As a real run did (examples/tiny.toml from its own result, optim.lr = 0.3)."""
    rng = np.random.default_rng(0)
    for start in (0.002, 1.0):
        assert len(told([start, *rng.uniform(4, 14, 39)])) == 1


def test_a_loss_that_falls_and_ends_near_nothing_is_none():
    rng = np.random.default_rng(0)
    losses = [5 * math.exp(-step / 20) * rng.uniform(0.3, 3.0) for step in range(300)]
    assert told(losses) == []


def test_a_rise_in_the_log_is_not_told_again_after_a_resume():
    losses = [2.0] * 20
    records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    assert told([9.0] * 10, 30, records) != []
    assert told([9.0] * 10, 30, [*records, rise_record(20, (2.0, 9.0))]) == []


def test_advice_names_the_rate_and_a_smaller_one():
    assert advice([{"step": 1, "loss": 2.0}], 6e-3) is None
    text = advice([rise_record(30, (5.7, 10.7))], 6e-3)
    assert "rose from 5.70 to 10.70 by step 30" in text
    assert "learning rate of 0.006" in text
    assert "optim.lr = 0.0006" in text


class Rising:
    """A task whose loss grows by itself."""

    def __init__(self):
        self.inner = new_regression()
        self.model = self.inner.model
        self.step = 0

    def batch(self, step, micro):
        return self.inner.batch(step, micro)

    def loss(self, batch):
        found = self.inner.loss(batch)
        rows, step = len(batch[0]), batch[2]
        return Loss(found.total * 0 + rows * (1.0 + step))

    def evaluate(self):
        return {}


@pytest.mark.parametrize("progress", [False, True])
def test_a_run_says_so_on_standard_error_and_in_its_log(tmp_path, capfd, progress):
    train(Rising(), new_recipe(), tmp_path / "run", progress=progress)
    _, err = capfd.readouterr()
    assert err.count("is likely too large") == 1
    records = RunLog(tmp_path / "run").records()
    assert sum("loss_risen_to" in record for record in records) == 1
    train(Rising(), new_recipe(steps=15), tmp_path / "run")
    assert "is likely too large" not in capfd.readouterr().err


def test_a_curve_that_is_not_drawn_is_told_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda _name: None)
    train(new_regression(), new_recipe(plot=True), tmp_path / "run")
    err = capfd.readouterr().err
    assert err.count("loss.png is not drawn") == 1
    assert "pip install 'lapilli[train]'" in err
    train(new_regression(), new_recipe(plot=False), tmp_path / "other")
    assert capfd.readouterr().err == ""
