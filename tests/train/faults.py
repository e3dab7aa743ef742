"""Runs in processes of their own, so that they can be killed; a server with torch forks them."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from lapilli.train.recipe import OptimRecipe, Recipe, RunRecipe
from lapilli.train.trainer.loop import Loss, train
from lapilli.train.trainer.metrics import RunLog

STEPS = 24
WAIT_S = 120


@dataclass
class Noisy:
    """A regression with dropout and held-out data; `pause` seconds are spent on every batch."""

    model: nn.Module
    pause: float = 0.0

    def batch(self, step, micro):
        time.sleep(self.pause)
        generator = torch.Generator().manual_seed(1000 * step + micro)
        rows = 2 + (step + micro) % 3
        inputs = torch.randn(rows, 8, generator=generator)
        return (inputs, inputs.sum(-1, keepdim=True)), rows

    def loss(self, batch):
        inputs, targets = batch
        total = (self.model(inputs) - targets).square().sum()
        return Loss(total, {"half": total.detach() / 2})

    def evaluate(self):
        batch, count = self.batch(10**6, 0)
        return {"eval_loss": self.loss(batch).total.item() / count}


def new_noisy(pause=0.0):
    torch.manual_seed(0)
    layers = (nn.Linear(8, 256), nn.Tanh(), nn.Dropout(0.2), nn.Linear(256, 256), nn.Linear(256, 1))
    return Noisy(nn.Sequential(*layers), pause)


def noisy_recipe(optim=None, **run):
    settings = {
        "steps": STEPS, "batch_size": 2, "gradient_accumulation_steps": 2,
        "save_every": 1, "log_every": 1,
        "evaluate_every": 3, "keep_best": True, "plot": False, "threads": 1,
    }  # fmt: skip
    chosen = OptimRecipe(lr=0.02, weight_decay=0.1, warmup_steps=3, ema=0.9)
    return Recipe(
        stage="instruct",
        optim=replace(chosen, **(optim or {})),
        run=RunRecipe(**{**settings, **run}),
    )


def run_noisy(folder, pause, settings):
    """What a process does: one run, from where it stands."""
    train(new_noisy(pause), noisy_recipe(**settings), folder)


def start(target, *arguments):
    """A process of its own, which has not computed anything before."""
    context = multiprocessing.get_context("forkserver")
    # An optimizer imports torch._dynamo at its first step: a second that every process would pay.
    context.set_forkserver_preload(["torch._dynamo", "tests.train.faults"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def kill(process, number=signal.SIGKILL):
    """Its exit code after this signal; negative: the signal itself."""
    os.kill(process.pid, number)
    process.join(WAIT_S)
    return process.exitcode


def wait_for(condition):
    """Poll until it holds; False after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def contents(folder):
    """Everything that a run leaves, but for measured times."""
    files = {name: torch.load(folder / name, weights_only=True) for name in ("state.pt", "best.pt")}
    log = [
        {k: v for k, v in r.items() if k not in ("per_s", "gib")} for r in RunLog(folder).records()
    ]
    return flat(files), log


def flat(value, name=""):
    """Tensors and values of nested containers by path."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}/{i}").items()}
    return {name: value}


def assert_same(folder, other):
    """Bit by bit."""
    (ours, log), (theirs, their_log) = contents(folder), contents(other)
    assert log == their_log
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if torch.is_tensor(value) else value == theirs[name]
        assert same, name
