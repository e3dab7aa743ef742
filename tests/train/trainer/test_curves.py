"""A loss that rises is told once; one that only jumps about is not."""

import math

import numpy as np
import pytest

from lapilli.train.trainer import metrics
from lapilli.train.trainer.contract import Loss
from lapilli.train.trainer.curves import LossWatch, advice, rise_record
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.metrics import RunLog
from tests.train.conftest import new_recipe, new_regression


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
