from dataclasses import replace

import pytest
import torch

from lapilli.errors import ConfigError
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import build_task
from lapilli.train.trainer.loop import evaluate, train
from lapilli.train.trainer.metrics import RunLog
from tests.train.conftest import new_recipe, new_regression
from tests.train.faults import new_noisy, noisy_recipe
from tests.train.real_run import recipe_of, write_samples


class Scripted:
    """Evaluation losses as given; remembers the weights of every evaluation."""

    def __init__(self, losses):
        self.task, self.losses, self.seen = new_regression(), list(losses), []

    @property
    def model(self):
        return self.task.model

    def batch(self, step, micro):
        return self.task.batch(step, micro)

    def loss(self, batch):
        return self.task.loss(batch)

    def evaluate(self):
        self.seen.append([p.detach().clone() for p in self.model.parameters()])
        return {"eval_loss": self.losses[len(self.seen) - 1], "accuracy": 0.5}


def test_the_model_ends_with_its_best_weights(tmp_path):
    task = Scripted([3.0, 1.0, 1.0, float("nan")])
    train(task, new_recipe(evaluate_every=3, keep_best=True), tmp_path)
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (kept["step"], kept["eval_loss"]) == (6, 1.0)  # the first of equals
    assert all(map(torch.equal, task.model.parameters(), task.seen[1]))
    assert not torch.equal(task.seen[1][0], task.seen[3][0])
    last = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(last["model"]["0.weight"], task.seen[3][0])
    metrics = [r["eval_loss"] for r in RunLog(tmp_path).records() if "eval_loss" in r]
    assert metrics[:3] == [3.0, 1.0, 1.0]


def test_what_is_not_a_number_is_never_best(tmp_path):
    task = Scripted([float("nan"), 2.0, float("nan"), 3.0])
    train(task, new_recipe(evaluate_every=3, keep_best=True), tmp_path)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 6
    assert all(map(torch.equal, task.model.parameters(), task.seen[1]))
    never = Scripted([float("nan")] * 4)
    train(never, new_recipe(evaluate_every=3, keep_best=True), tmp_path / "never")
    assert not (tmp_path / "never" / "best.pt").exists()
    assert all(map(torch.equal, never.model.parameters(), never.seen[3]))


def test_the_best_survives_a_resume(tmp_path):
    recipe = new_recipe(evaluate_every=3, keep_best=True)
    first = Scripted([1.0, 2.0])
    first.task.fails_at = 7
    with pytest.raises(RuntimeError, match="loss of step 8 is"):
        train(first, recipe, tmp_path)
    second = Scripted([1.5, 1.25])
    train(second, recipe, tmp_path)
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (kept["step"], kept["eval_loss"]) == (3, 1.0)
    assert all(map(torch.equal, second.model.parameters(), first.seen[0]))


def test_a_finished_run_gives_its_best_again(tmp_path):
    recipe = new_recipe(evaluate_every=3, keep_best=True)
    first, again = Scripted([1.0, 2.0, 3.0, 4.0]), Scripted([])
    train(first, recipe, tmp_path)
    train(again, recipe, tmp_path)
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))


def test_averages_are_evaluated_and_left_in_the_model(tmp_path):
    task = Scripted([1.0, 2.0])
    recipe = new_recipe(steps=6, evaluate_every=3)
    train(task, replace(recipe, optim=replace(recipe.optim, ema=0.9)), tmp_path)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    averages = list(kept["average"].values())
    assert all(map(torch.equal, averages, task.seen[1]))
    assert all(map(torch.equal, averages, task.model.parameters()))
    assert not torch.equal(kept["model"]["0.weight"], averages[0])


def test_averages_change_no_step(tmp_path):
    plain, averaged = new_noisy(), new_noisy()
    train(plain, noisy_recipe({"ema": 0.0}, keep_best=False, steps=6), tmp_path / "plain")
    train(averaged, noisy_recipe({"ema": 0.9}, keep_best=False, steps=6), tmp_path / "averaged")
    ours, theirs = (
        torch.load(tmp_path / name / "state.pt", weights_only=True)["model"]
        for name in ("plain", "averaged")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluation_draws_no_dropout_and_no_gradient():
    task = new_noisy()
    first, second = (evaluate(task, noisy_recipe()) for _ in range(2))
    assert first == second
    assert task.model.training
    assert all(p.grad is None for p in task.model.parameters())


def test_keep_best_needs_an_evaluation_loss(tmp_path, regression):
    with pytest.raises(ConfigError, match=r"needs eval_loss, .* gave \['training'\]"):
        train(regression, new_recipe(evaluate_every=2, keep_best=True), tmp_path)
    with pytest.raises(ConfigError, match=r"run.evaluate_every is 0"):
        new_recipe(keep_best=True)


@pytest.mark.slow
def test_nothing_that_is_drawn_while_training_is_in_an_evaluation(checkpoint, tmp_path):
    """Noise or dropout as large as they go leave the metrics as they are."""
    file = write_samples(tmp_path)
    found, learned = [], []
    for alpha, dropout in ((0.0, 0.0), (50.0, 0.0), (0.0, 0.9)):
        recipe = recipe_of(checkpoint, file, alpha=alpha, dropout=dropout)
        task = build_task(recipe, SINGLE_PROCESS)
        with torch.no_grad():
            for name, parameter in task.model.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.05)  # fresh adapters change nothing, and differ
        found.append(evaluate(task, recipe))
        assert task.model.training
        batch, count = task.batch(0, 0)
        learned.append(task.loss(batch).parts["answers"].item() / count)
    assert found[0] == found[1] == found[2]
    assert all(abs(loss - learned[0]) > 0.01 for loss in learned[1:])
