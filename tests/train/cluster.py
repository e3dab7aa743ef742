"""Jobs that several processes of one machine do together, and what starts them.

A job is a function of this module, called as job(seat, folder, *arguments) in every process. The
processes are forks of one server that has imported everything, so that starting four costs no
time; they meet at a file.
"""

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from pathlib import Path

import torch

from lapilli.train.loop import train
from lapilli.train.parallel import Seat, joined
from tests.train.conftest import new_recipe, new_regression

torch.set_num_threads(1)

BEAT_S = 0.3


def together(job, size, folder, *arguments, timeout_s=60):
    """What each of `size` processes answers: a value, an exception, or its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    lines, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        seat = Seat(rank, size, rank, f"file://{meeting}")
        process = context.Process(target=_run, args=(theirs, job, seat, folder, *arguments))
        process.start()
        theirs.close()
        lines.append(ours)
        processes.append(process)
    end = time.monotonic() + timeout_s
    return [_answer(*pair, end) for pair in zip(lines, processes, strict=True)]


def _answer(line, process, end):
    """What came through the line before the process ended; its exit code if nothing did."""
    try:
        if line.poll(max(end - time.monotonic(), 0.1)):
            return pickle.loads(line.recv())
    except EOFError:  # it died without a word
        process.join()
        return process.exitcode
    finally:
        process.join(5)
        process.kill()
    return TimeoutError("still running")


def _run(line, job, seat, folder, *arguments):
    try:
        answer = job(seat, folder, *arguments)
    except Exception as error:  # noqa: BLE001  told to whoever started us
        traceback.print_exc()
        answer = RuntimeError(f"{type(error).__name__}: {error}")
    line.send(pickle.dumps(answer))
    line.close()


class Killed:
    """A task that dies, or fails, in one process at one step."""

    def __init__(self, task, seat, step, how):
        self._task, self._seat, self._step, self._how = task, seat, step, how
        self.model, self.evaluate = task.model, task.evaluate

    def batch(self, step, micro):
        if step == self._step and micro == self._seat.rank:
            self._how()
        return self._task.batch(step, micro)

    def loss(self, batch):
        return self._task.loss(batch)


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("row 17 has no picture")


def run_regression(seat, folder, sharding, run, dies=None):
    """Weights after training; `dies`: (rank, step, how) of a process that does not come through."""
    with joined(seat, sharding=sharding, device="cpu", timeout_s=20, beat_s=BEAT_S) as team:
        task = new_regression()
        team.wrap(task.model)
        if dies and dies[0] == seat.rank:
            task = Killed(task, seat, *dies[1:])
        train(task, new_recipe(**run), folder / "run", team=team)
        return {name: _whole(p) for name, p in task.model.named_parameters()}


def _whole(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()


def losses(folder: Path):
    """The loss of every step that a run has logged."""
    import json

    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["loss"] for record in records if "loss" in record]
