from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lapilli.errors import ConfigError
from lapilli.train.distributed import ParallelContext
from lapilli.train.recipe import RunRecipe
from lapilli.train.trainer.loop import number_of_steps, train
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.model import cross_entropy_sum, noisy, noisy_samples, supervised
from lapilli.train.trainer.step import plain, scales, take_step
from lapilli.train.trainer.task import Loss, Task, TrainingError
from tests.train.conftest import new_recipe, new_regression
from tests.train.faults import new_noisy


@dataclass(frozen=True)
class EncodedDataset:
    inputs: torch.Tensor
    words: dict
    ids: tuple[str, ...] = ("a", "b")


class Named:
    """Batches that know their samples; `breaks` is done to the loss of step 2, micro-batch 1."""

    num_samples = 23

    def __init__(self, breaks=lambda total: total):
        self.model, self.breaks = nn.Linear(3, 1), breaks

    def batch(self, step, micro):
        inputs = torch.full((2, 3), float(step + micro))
        return EncodedDataset(inputs, {"at": np.array([step, micro])}, (f"s{step}", f"m{micro}")), 2

    def loss(self, batch):
        total = self.model(batch.inputs).square().sum()
        return Loss(self.breaks(total) if list(batch.words["at"]) == [2, 1] else total)

    def evaluate(self) -> Mapping[str, float]:
        return {}


def sum_of_steps(task, recipe, steps=3):
    """Weights after some steps, taken by hand."""
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    records = []
    for step in range(steps):
        made = {m: task.batch(step, m) for m in range(recipe.run.gradient_accumulation_steps)}
        records.append(take_step(task, optimizer, recipe, made, step=step))
    return records


def test_accumulated_batches_are_one_batch():
    recipe = new_recipe(gradient_accumulation_steps=4)
    split, whole = new_regression(), new_regression()
    draw = whole.batch

    def joined(step, micro):
        parts = [draw(step, m) for m in range(4)]
        inputs, targets = (torch.cat([part[0][i] for part in parts]) for i in (0, 1))
        return (inputs, targets, step), sum(count for _, count in parts)

    whole.batch = joined
    ours = sum_of_steps(split, recipe)
    theirs = sum_of_steps(whole, new_recipe(gradient_accumulation_steps=1))
    assert [r.count for r in ours] == [r.count for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
    for one, other in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_llavas_reduction_is_the_mean_of_means():
    recipe = new_recipe(gradient_accumulation_steps=2, reduction="llava")
    task = new_regression()
    means = []
    for micro in range(2):
        batch, count = task.batch(0, micro)
        means.append(task.loss(batch).total.item() / count)
    (record,) = sum_of_steps(task, recipe, steps=1)
    assert record.metrics["loss"] == pytest.approx(sum(means) / 2)


def test_clipping_holds_the_step_down():
    recipe = new_recipe()
    clipped, free = new_regression(), new_regression()
    before = [p.detach().clone() for p in clipped.model.parameters()]
    small = replace(recipe, optim=replace(recipe.optim, max_grad_norm=0.01))
    (record,) = sum_of_steps(clipped, small, steps=1)
    (same,) = sum_of_steps(
        free, replace(recipe, optim=replace(recipe.optim, max_grad_norm=1e9)), steps=1
    )
    assert record.metrics["norm"] == pytest.approx(same.metrics["norm"])
    moved = [p.detach() - old for p, old in zip(clipped.model.parameters(), before, strict=True)]
    norm = torch.cat([m.flatten() for m in moved]).norm().item()
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_dropout_is_a_function_of_seed_and_step():
    def first_loss(seed, consumed):
        torch.manual_seed(99)
        torch.randn(consumed)
        (record,) = sum_of_steps(new_noisy(), new_recipe(seed=seed), steps=1)
        return record.metrics["loss"]

    assert first_loss(0, 1) == first_loss(0, 50)
    assert first_loss(0, 1) != first_loss(1, 1)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lambda total: total * float("nan"), r"loss of step 3 is nan \(samples s2, m1\)"),
        (lambda total: total / 0.0, r"loss of step 3 is inf \(samples s2, m1\)"),
        (
            lambda total: total + (total - total).abs().sqrt(),
            r"gradient norm of step 3 is nan \(samples s2, m0, s2, m1\)",
        ),
    ],
)
def test_what_is_not_finite_stops_before_the_update(tmp_path, breaks, said):
    task = Named(breaks)
    with pytest.raises(TrainingError, match=said + r": its batch is in .*bad_batch.pt"):
        train(task, new_recipe(save_every=1), tmp_path)
    assert all(torch.isfinite(p).all() for p in task.model.parameters())
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(torch.equal(kept["model"][n], p) for n, p in task.model.named_parameters())
    bad = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert (bad[-1]["step"], bad[-1]["micro"], bad[-1]["ids"]) == (2, 1, ["s2", "m1"])
    assert torch.equal(bad[-1]["batch"]["inputs"], torch.full((2, 3), 3.0))
    assert bad[-1]["batch"]["words"]["at"].tolist() == [2, 1]
    assert RunLog(tmp_path).records()[-1]["step"] == 2


def test_an_unwritable_batch_does_not_hide_the_loss(tmp_path):
    (tmp_path / "bad_batch.pt" / "x").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"loss of step 3 is nan .* Its batch is lost: "):
        train(Named(lambda total: total * float("nan")), new_recipe(), tmp_path)


def test_plain_values_need_no_class():
    made = plain(
        {"rows": EncodedDataset(torch.ones(1), {}), "odd": {1: object}, "n": [1, None, "x"]}
    )
    assert made["rows"]["ids"] == ("a", "b")
    assert made["n"] == (1, None, "x")
    assert made["odd"] == {"1": "<class 'object'>"}


def test_epochs_become_steps():
    task = Named()
    assert isinstance(task, Task)
    assert number_of_steps(task, RunRecipe(batch_size=2, gradient_accumulation_steps=3)) == 4
    assert (
        number_of_steps(task, RunRecipe(batch_size=2, gradient_accumulation_steps=3, epochs=2.0))
        == 8
    )
    assert (
        number_of_steps(task, RunRecipe(batch_size=2, gradient_accumulation_steps=3, steps=5)) == 5
    )
    task.num_samples = 10
    run = RunRecipe(batch_size=2, gradient_accumulation_steps=2)
    epochs = (0.1, 1.0, 2.0, 2.5)
    assert [number_of_steps(task, replace(run, epochs=n)) for n in epochs] == [1, 3, 5, 7]
    task.num_samples = 30
    assert number_of_steps(task, RunRecipe(batch_size=1, epochs=0.1)) == 3
    uncounted = new_regression()
    assert isinstance(uncounted, Task)
    assert not hasattr(uncounted, "num_samples")
    with pytest.raises(ConfigError, match=r"set run.steps"):
        number_of_steps(uncounted, RunRecipe(batch_size=1))


def test_every_process_needs_a_micro_batch(tmp_path, regression):
    with pytest.raises(
        ConfigError, match=r"run.gradient_accumulation_steps is 2 and 3 processes .* to 3 or more"
    ):
        train(regression, new_recipe(), tmp_path, parallel=ParallelContext(0, 3))


def test_bfloat16_is_for_the_passes_alone(tmp_path):
    seen = []
    task = new_regression()
    task.model[0].register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    train(task, new_recipe(steps=2, precision="bfloat16"), tmp_path)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in task.model.parameters())


def test_on_save_is_called_after_each_checkpoint(tmp_path, regression):
    told = []
    train(regression, new_recipe(save_every=5), tmp_path, on_save=told.append)
    assert told == [5, 10, 12]


def test_on_save_sees_the_averages_in_the_model(tmp_path, regression):
    recipe, seen = new_recipe(steps=6), {}
    first = regression.model[0].weight

    def look(step):
        kept = torch.load(tmp_path / "state.pt", weights_only=True)
        assert kept["step"] == step
        seen[step] = (first.detach().clone(), kept)

    averaged = replace(recipe, optim=replace(recipe.optim, ema=0.5))
    train(regression, averaged, tmp_path, on_save=look)
    assert sorted(seen) == [3, 6]
    for weight, kept in seen.values():
        assert torch.equal(weight, kept["average"]["0.weight"])
        assert not torch.equal(weight, kept["model"]["0.weight"])


def test_a_position_predicts_its_successor():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 0]])
    mask = torch.tensor([[False, False, True, True], [True, True, False, False]])
    where, targets = supervised(ids, mask)
    assert where.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert targets.tolist() == [7, 8, 2]


def test_tokens_and_llava_differ_only_in_weights():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9), torch.randint(9, (6,))
    parts = [(logits[:1], targets[:1]), (logits[1:], targets[1:])]
    sums = [cross_entropy_sum(*part) for part in parts]
    by_token = sum(s * w for s, w in zip(sums, scales([1, 5], "tokens"), strict=True))
    torch.testing.assert_close(by_token, F.cross_entropy(logits, targets))
    by_batch = sum(s * w for s, w in zip(sums, scales([1, 5], "llava"), strict=True))
    means = [F.cross_entropy(*part) for part in parts]
    torch.testing.assert_close(by_batch, (means[0] + means[1]) / 2)


def test_nothing_supervised_is_an_error():
    with pytest.raises(ValueError, match=r"no supervised token among 2 micro-batches"):
        scales([0, 0], "tokens")
    with pytest.raises(ValueError, match=r"\[3, 0\]"):
        scales([3, 0], "llava")
    assert scales([3, 0], "tokens") == [1 / 3, 1 / 3]


WIDTH = 64


def test_every_sample_of_a_packed_row_has_its_own_size():
    torch.manual_seed(0)
    segments = ((40, 10), (25,))
    moved = noisy_samples(torch.ones(2, 60, WIDTH), segments, 5.0) - 1
    for row, start, length in ((0, 0, 40), (0, 40, 10), (1, 0, 25)):
        limit = 5.0 / (length * WIDTH) ** 0.5
        part = moved[row, start : start + length]
        assert 0.98 * limit < part.abs().max() <= limit * 1.0001
        assert part.mean().abs() < 0.05 * limit  # to both sides
        assert part.abs().mean() == pytest.approx(limit / 2, rel=0.1)
    assert not moved[0, 50:].any()
    assert not moved[1, 25:].any()


def test_a_picture_has_the_size_of_its_features():
    torch.manual_seed(0)
    moved = noisy(torch.zeros(100, WIDTH), 5.0)
    limit = 5.0 / (100 * WIDTH) ** 0.5
    assert 0.98 * limit < moved.abs().max() <= limit * 1.0001
