"""A task small enough to be trained to the bit in a test."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lapilli.train.recipe import OptimRecipe, Recipe, RunRecipe
from lapilli.train.trainer.loop import Loss
from lapilli.train.trainer.metrics import RunLog
from tests.checkpoint.conftest import golden  # noqa: F401  fixture


@dataclass
class Regression:
    """Rows drawn from the step; `fails_at` makes the loss of one step infinite."""

    model: nn.Module
    fails_at: int | None = None

    def batch(self, step, micro):
        generator = torch.Generator().manual_seed(1000 * step + micro)
        rows = 2 + (step + micro) % 3
        inputs = torch.randn(rows, 4, generator=generator)
        return (inputs, inputs.sum(-1, keepdim=True), step), rows

    def loss(self, batch):
        inputs, targets, step = batch
        total = (self.model(inputs) - targets).square().sum()
        if step == self.fails_at:
            total = total * float("inf")
        return Loss(total, {"half": total.item() / 2})

    def evaluate(self) -> Mapping[str, float]:
        return {"training": float(self.model.training)}


def steps_of(folder):
    """The records of steps, without those of evaluations."""
    return [record for record in RunLog(folder).records() if "loss" in record]


def new_regression(fails_at=None):
    torch.manual_seed(0)
    return Regression(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), fails_at)


def new_recipe(**run):
    settings = {
        "steps": 12,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_every": 3,
        "log_every": 1,
        "plot": False,
    }
    return Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=0.01, weight_decay=0.1, warmup_steps=3),
        run=RunRecipe(**{**settings, **run}),
    )


@pytest.fixture(scope="session")
def checkpoint(golden):  # noqa: F811
    """A tiny LLaVA 1.5 of the golden numbers."""
    return str(golden("llava-v1.5-tiny-pad")[1]["model_path"])


@pytest.fixture
def regression():
    return new_regression()
