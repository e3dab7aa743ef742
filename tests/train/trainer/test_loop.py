import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lapilli.train.distributed import ParallelContext
from lapilli.train.trainer.loop import Stopped, TrainingError, train
from lapilli.train.trainer.metrics import RunLog
from tests.train.conftest import new_recipe, new_regression, steps_of

ROOT = Path(__file__).parents[3]


def weights(task):
    return [p.detach().clone() for p in task.model.parameters()]


@pytest.mark.slow
def test_loss_falls_and_every_step_is_logged(tmp_path, regression):
    train(regression, new_recipe(steps=150, save_every=150), tmp_path)
    records = steps_of(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 151))
    losses = [record["loss"] for record in records]
    assert sum(losses[-20:]) < sum(losses[:20]) / 4
    assert records[0]["half"] == pytest.approx(records[0]["loss"] / 2)


def test_a_run_in_two_parts_makes_the_same_bits(tmp_path):
    whole, first, second = new_regression(), new_regression(), new_regression()
    train(whole, new_recipe(), tmp_path / "whole")
    stopped = new_regression(fails_at=7)
    with pytest.raises(TrainingError):
        train(stopped, new_recipe(), tmp_path / "parts")
    del first
    train(second, new_recipe(), tmp_path / "parts")
    assert all(map(torch.equal, weights(whole), weights(second)))
    log = [
        {k: v for k, v in record.items() if k != "per_s"}
        for record in RunLog(tmp_path / "parts").records()
    ]
    same = [
        {k: v for k, v in record.items() if k != "per_s"}
        for record in RunLog(tmp_path / "whole").records()
    ]
    assert log == same


KILLED = """
import sys, time
from pathlib import Path
from lapilli.train.trainer.loop import train
from tests.train.conftest import new_recipe, new_regression
task = new_regression()
draw = task.batch
def slow(step, micro):
    time.sleep(0.05 if len(sys.argv) > 2 else 0)
    return draw(step, micro)
task.batch = slow
train(task, new_recipe(steps=40), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), "slow"], env=environment, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    at_kill = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"]
    assert 0 < at_kill < 40
    resumed, whole = new_regression(), new_regression()
    train(resumed, new_recipe(steps=40), tmp_path / "killed")
    train(whole, new_recipe(steps=40), tmp_path / "whole")
    assert all(map(torch.equal, weights(whole), weights(resumed)))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(tmp_path):
    with pytest.raises(TrainingError, match=r"loss of step 5 is .*bad_batch.pt"):
        train(new_regression(fails_at=4), new_recipe(), tmp_path)
    kept = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert [(item["step"], item["micro"], item["batch"][2]) for item in kept] == [
        (4, 0, 4),
        (4, 1, 4),
    ]


def test_evaluation_is_logged_in_evaluation_mode(tmp_path, regression):
    train(regression, new_recipe(steps=4, evaluate_every=2), tmp_path)
    assert [r["training"] for r in RunLog(tmp_path).records() if "training" in r] == [0.0, 0.0]
    assert regression.model.training


def test_what_is_held_out_is_evaluated_once_where_nobody_asked_for_more(tmp_path, regression):
    train(regression, new_recipe(steps=4), tmp_path)
    assert [r["step"] for r in RunLog(tmp_path).records() if "training" in r] == [4]


def test_frozen_parameters_keep_their_bits(tmp_path, regression):
    regression.model[0].weight.requires_grad_(False)
    before = regression.model[0].weight.clone()
    train(regression, new_recipe(), tmp_path)
    assert torch.equal(before, regression.model[0].weight)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    assert "0.weight" not in saved


def test_a_log_line_that_a_kill_cut_short_is_left_out(tmp_path):
    log = RunLog(tmp_path)
    log.write({"step": 1, "loss": 2.0})
    log.write({"step": 2, "loss": 1.0})
    with log.path.open("a") as file:
        file.write(json.dumps({"step": 3})[:5])
    assert [record["step"] for record in log.records()] == [1, 2]
    log.rewind(1)
    assert [record["step"] for record in log.records()] == [1]


TOGETHER = """
import sys
from pathlib import Path
import torch
from lapilli.train.trainer.loop import train
from lapilli.train.distributed import RankInfo, joined
from tests.train.conftest import new_recipe, new_regression
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
task = new_regression()
with joined(RankInfo(rank, 2, meeting=f"file://{folder}/meeting"), device="cpu") as parallel:
    train(task, new_recipe(), folder / str(rank), parallel=parallel)
torch.save([p.detach() for p in task.model.parameters()], folder / f"{rank}.pt")
"""


@pytest.mark.cluster
def test_two_processes_take_the_steps_of_one(tmp_path, regression):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), str(rank)], env=environment, cwd=ROOT
        )
        for rank in (0, 1)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    train(regression, new_recipe(), tmp_path / "alone")
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, other in zip(weights(regression), together, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    ours, theirs = steps_of(tmp_path / "alone"), steps_of(tmp_path / "0")
    assert [r["loss"] for r in theirs] == pytest.approx([r["loss"] for r in ours], rel=1e-5)
    assert not (tmp_path / "1" / "log.jsonl").exists()


def test_processes_split_micro_batches():
    assert list(ParallelContext(1, 3).micro_batches(8)) == [1, 4, 7]
    with pytest.raises(ValueError, match="process 2 of 2"):
        ParallelContext(2, 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_was_asked_to_stop_says_where_it_stands(tmp_path, regression, number, code):
    draw = regression.batch

    def draw_and_ask(step, micro):
        if (step, micro) == (4, 1):
            signal.raise_signal(number)
        return draw(step, micro)

    regression.batch = draw_and_ask
    with pytest.raises(Stopped) as told:
        train(regression, new_recipe(save_every=100), tmp_path)
    assert told.value.code == code
    assert told.value.message == (
        f"stopped by {number.name} after step 5 of 12: the state is in {tmp_path / 'state.pt'}; "
        "the same command goes on from there"
    )
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 5


def test_a_run_with_other_batches_is_refused_before_a_step(tmp_path):
    first, second = new_regression(), new_regression()
    first.fingerprint = lambda: {"run.seed": 0, "data.group": "none"}
    second.fingerprint = lambda: {"run.seed": 0, "data.group": "length"}
    train(first, new_recipe(steps=3), tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(
        TrainingError, match=r"\(data.group: the state says 'none', the recipe 'length'\): go on"
    ):
        train(second, new_recipe(), tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    train(first, new_recipe(), tmp_path)
