"""Killed at any moment, also while saving, and continued: the same bits as undisturbed."""

import random
import signal
import time

import pytest
import torch

from lapilli.checkpoint.load import load_checkpoint
from lapilli.train.distributed import RankInfo, joined
from lapilli.train.trainer.loop import Loss, TrainingError, train
from lapilli.train.trainer.metrics import RunLog
from tests.conformance.ops.training import read_tensors
from tests.train import real_run
from tests.train.faults import (
    STEPS,
    assert_same,
    kill,
    new_noisy,
    noisy_recipe,
    run_noisy,
    start,
    wait_for,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(new_noisy(), noisy_recipe(), folder)
    return folder


def step_of(folder):
    path = folder / "state.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


@pytest.mark.slow
def test_killed_while_saving(tmp_path, undisturbed):
    killed_at = []
    for _ in range(2):
        child = start(run_noisy, tmp_path, 0.01, {})
        begun = step_of(tmp_path)
        # A later save than the first of this process, caught with its file half written.
        assert wait_for(lambda begun=begun: len(RunLog(tmp_path).records()) > begun + 3)
        assert wait_for((tmp_path / "state.part").exists)
        assert kill(child) == -signal.SIGKILL
        killed_at.append(step_of(tmp_path))  # whole
    assert killed_at == sorted(killed_at)
    assert 0 < killed_at[0] < killed_at[-1] < STEPS
    train(new_noisy(), noisy_recipe(), tmp_path)
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_model_that_is_killed_learns_the_same(tmp_path, checkpoint):
    """With all that a run draws or remembers, from samples on disk to the adapter that is left."""
    file = real_run.write_samples(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    real_run.run(whole, checkpoint, file)
    child = start(real_run.run, folder, checkpoint, file, 0.02)
    assert wait_for(lambda: len(RunLog(folder).records()) >= 3)
    assert kill(child) == -signal.SIGKILL
    assert 0 < step_of(folder) < real_run.STEPS
    load_checkpoint(folder / "model", dtype="float32", device="cpu")  # left on the way, and whole
    real_run.run(folder, checkpoint, file)
    assert_same(folder, whole)
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        ours, theirs = (read_tensors(path / "model" / name) for path in (folder, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments(tmp_path, undisturbed, workers):
    chance, kills = random.Random(workers), 0
    for _ in range(40):
        child = start(run_noisy, tmp_path, 0.03, {"workers": workers})
        enough = step_of(tmp_path) + chance.randint(1, 3)
        assert wait_for(
            lambda child=child, enough=enough: (
                child.exitcode is not None or len(RunLog(tmp_path).records()) >= enough
            )
        )
        child.join(chance.uniform(0.0, 0.1))
        if child.exitcode is not None:
            break
        assert kill(child) == -signal.SIGKILL
        kills += 1
    child = start(run_noisy, tmp_path, 0.0, {"workers": workers})
    child.join(120)
    assert child.exitcode == 0
    assert kills >= 3
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_after_the_step(tmp_path, undisturbed, number, code):
    rarely = {"save_every": 100, "workers": 1}
    child = start(run_noisy, tmp_path, 0.05, rarely)
    assert wait_for(lambda: len(RunLog(tmp_path).records()) > 4)
    assert not (tmp_path / "state.pt").exists()
    assert kill(child, number) == code
    done = step_of(tmp_path)
    assert 0 < done < STEPS
    assert RunLog(tmp_path).records()[-1]["step"] == done
    train(new_noisy(), noisy_recipe(save_every=100), tmp_path)
    assert_same(tmp_path, undisturbed)


def read_for_ever(folder):
    task = new_noisy()

    def batch(step, micro):
        (folder / "reading").touch()
        time.sleep(600)

    task.batch = batch
    train(task, noisy_recipe(), folder)


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path):
    child = start(read_for_ever, tmp_path)
    assert wait_for((tmp_path / "reading").exists)
    child.terminate()
    child.join(0.5)
    assert child.is_alive()
    assert kill(child, signal.SIGTERM) == -signal.SIGTERM
    assert not (tmp_path / "state.pt").exists()


def run_together(folder, rank, faulty):
    """One of two processes; the loss of the second is no number in step 4 where `faulty`."""
    task = new_noisy(0.05)
    own_loss = task.loss

    def loss(batch):
        made = own_loss(batch)
        task.calls = getattr(task, "calls", 0) + 1
        spoiled = made.total * float("nan") if rank == 1 and task.calls == 5 else made.total
        return Loss(spoiled, made.parts)

    if faulty:
        task.loss = loss
    recipe = noisy_recipe(save_every=100, evaluate_every=0, keep_best=False)
    place = RankInfo(rank, 2, meeting=f"file://{folder}/meeting")
    with joined(place, device="cpu") as parallel:
        try:
            train(task, recipe, folder / str(rank), parallel=parallel)
        except TrainingError as error:
            (folder / f"told_{rank}").write_text(str(error))


@pytest.mark.cluster
def test_all_processes_stop_when_one_is_asked_to(tmp_path):
    children = [start(run_together, tmp_path, rank, False) for rank in range(2)]
    assert wait_for(lambda: len(RunLog(tmp_path / "0").records()) > 3)
    assert kill(children[1], signal.SIGTERM) == 143
    children[0].join(60)
    assert children[0].exitcode == 143
    assert 3 < step_of(tmp_path / "0") < STEPS


@pytest.mark.cluster
def test_all_processes_stop_at_a_loss_that_one_of_them_has(tmp_path):
    children = [start(run_together, tmp_path, rank, True) for rank in range(2)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    told = [(tmp_path / f"told_{rank}").read_text() for rank in range(2)]
    assert "loss of step 5 is nan, from a batch of another process" in told[0]
    assert "bad_batch_1.pt" in told[1]
    (bad,) = torch.load(tmp_path / "1" / "bad_batch_1.pt", weights_only=True)
    assert (bad["step"], bad["micro"]) == (4, 1)
