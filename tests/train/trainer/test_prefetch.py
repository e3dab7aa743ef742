import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from lapilli.errors import ConfigError, DataError
from lapilli.train.distributed import ParallelContext
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.prefetch import ReadAhead, batches
from lapilli.train.trainer.task import TrainingError
from tests.train.conftest import new_recipe, new_regression
from tests.train.faults import start, wait_for

PLACES = [(step, micro) for step in range(4) for micro in ParallelContext(1, 3).micro_batches(5)]


def make(step, micro):
    if (step, micro) == (2, 1):
        time.sleep(0.2)  # slower than those after it
    generator = torch.Generator().manual_seed(10 * step + micro)
    return {"pixels": torch.randn(3, 4, generator=generator), "pid": os.getpid()}, step + micro


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_items_come_in_order_and_are_the_same(workers):
    with batches(make, PLACES, workers) as take:
        for step, micro in PLACES:
            (batch, count), (expected, same) = take(step, micro), make(step, micro)
            assert torch.equal(batch["pixels"], expected["pixels"])
            assert count == same
            assert batch["pid"] != os.getpid()
        with pytest.raises(ConfigError, match="expected nothing more"):
            take(0, 0)


def test_without_workers_batches_are_made_in_this_process():
    with batches(make, PLACES, 0) as take:
        assert take(1, 1)[0]["pid"] == os.getpid()


def test_another_order_is_refused():
    said = r"micro-batch 4 of step 0 .* expected \(0, 1\)"
    with batches(make, PLACES, 2) as take, pytest.raises(ConfigError, match=said):
        take(0, 4)


def fails(step, micro):
    if step == 1:
        raise DataError(f"train.json:7: sample s{micro} is empty")
    return step, 1


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def fails_oddly(step, micro):
    raise OddError("not to be pickled", 2)


def test_an_error_of_a_worker_is_raised_where_its_item_is_taken():
    with batches(fails, [(0, 0), (1, 0)], 1) as take:
        assert take(0, 0) == (0, 1)
        with pytest.raises(DataError, match=r"train.json:7: sample s0 is empty") as told:
            take(1, 0)
    assert "in fails" in str(told.value.__cause__)
    said = "OddError: not to be pickled"
    with batches(fails_oddly, [(0, 0)], 1) as take, pytest.raises(TrainingError, match=said):
        take(0, 0)


def hangs(step, micro):
    if step:
        time.sleep(600)
    return step, 1


def test_a_killed_worker_is_named_with_what_it_was_reading():
    with batches(hangs, [(0, 0), (1, 0), (2, 0)], 1) as take:
        take(0, 0)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(
            TrainingError, match=r"micro-batch 0 of step 2 died \(SIGKILL: often the kernel's"
        ):
            take(1, 0)
    assert not multiprocessing.active_children()


def quits(step, micro):
    os._exit(3)


def test_an_exit_code_is_told():
    said = r"died \(exit code 3\).*run.workers = 0"
    with batches(quits, [(0, 0)], 1) as take, pytest.raises(TrainingError, match=said):
        take(0, 0)


@pytest.mark.slow
def test_a_run_with_workers_makes_the_same_bits(tmp_path):
    alone, helped = new_regression(), new_regression()
    train(alone, new_recipe(), tmp_path / "alone")
    train(helped, new_recipe(workers=3), tmp_path / "helped")
    pairs = zip(alone.model.parameters(), helped.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_nothing_is_lost(tmp_path):
    task = new_regression()
    draw = task.batch

    def draw_or_die(step, micro):
        if (step, micro) == (7, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(step, micro)

    task.batch = draw_or_die
    task.names = lambda step, micro: [f"rows.json:{step}", f"rows.json:{micro}"]
    with pytest.raises(
        TrainingError, match=r"micro-batch 1 of step 8 \(rows.json:7, rows.json:1\) died"
    ):
        train(task, new_recipe(workers=2), tmp_path)
    resumed, whole = new_regression(), new_regression()
    train(resumed, new_recipe(workers=2), tmp_path)
    train(whole, new_recipe(), tmp_path / "whole")
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def waits(step, micro):
    return step, 1


def hold_idle(path):
    ahead = ReadAhead(waits, [], 3)
    pids = [worker.process.pid for worker in ahead._workers]
    path.with_suffix(".part").write_text(" ".join(map(str, pids)))
    path.with_suffix(".part").replace(path)
    time.sleep(600)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_idle_workers_end_with_the_process_that_started_them(tmp_path):
    child = start(hold_idle, tmp_path / "pids")
    assert wait_for((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(is_alive, pids))
    child.kill()
    assert wait_for(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize(
    ("made_of", "shown"), [("", ""), ("a.json:3, a.json:9", r" \(a.json:3, a.json:9\)")]
)
def test_a_dead_worker_is_named_with_what_it_was_reading_from(made_of, shown):
    told = pytest.raises(TrainingError, match=f"micro-batch 2 of step 1{shown} died")
    with batches(quits, [(0, 2)], 1, describe=lambda *_: made_of) as take, told:
        take(0, 2)
