import io
import json
import struct
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from rich.console import Console

from lapilli.errors import ConfigError
from lapilli.train.trainer import metrics
from lapilli.train.trainer.curves import evaluation_curve, loss_curve, plot_losses
from lapilli.train.trainer.loop import TrainingError, train
from lapilli.train.trainer.metrics import ProgressBar, RunLog, open_trackers
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
    assert [step for step, _ in evaluation_curve(records)] == [3, 6]


def test_a_folder_may_be_called_anything(tmp_path):
    folder = tmp_path / "$a_b_c$ \\frac{"
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
    starts = [history(folder / f"run-{name}.wandb") for folder in folders]
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
