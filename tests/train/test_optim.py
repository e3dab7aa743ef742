import pytest
import torch
from torch import nn

from lapilli.train.optim import build_optimizer, lr_share, parameter_groups, set_lr
from lapilli.train.recipe import OptimRecipe


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.language_model = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.projector = nn.Linear(3, 3)
        self.vision_tower = nn.Linear(3, 3, bias=False)


def test_groups_by_part_and_by_number_of_axes():
    model = Parts()
    recipe = OptimRecipe(lr=1e-3, projector_lr=1e-2, tower_lr=1e-4, weight_decay=0.1)
    groups = {
        (g["base_lr"], g["weight_decay"]): g["params"] for g in parameter_groups(model, recipe)
    }
    assert groups[1e-3, 0.1] == [model.language_model.weight]
    assert groups[1e-3, 0.0] == [model.language_model.bias, model.norm.weight, model.norm.bias]
    assert groups[1e-2, 0.1] == [model.projector.weight]
    assert groups[1e-2, 0.0] == [model.projector.bias]
    assert groups[1e-4, 0.1] == [model.vision_tower.weight]


def test_frozen_parameters_are_in_no_group():
    model = Parts()
    model.projector.requires_grad_(False)
    owned = [p for g in parameter_groups(model, OptimRecipe(lr=1.0)) for p in g["params"]]
    assert all(p is not model.projector.weight for p in owned)
    assert len(owned) == 5


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.8535534, 0.5, 0.1464466]),
        ("trapezoid", [0.0, 0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
    ],
)
def test_schedules(schedule, expected):
    recipe = OptimRecipe(lr=1.0, schedule=schedule, warmup_steps=2, decay_share=0.5)
    assert [lr_share(step, 6, recipe) for step in range(6)] == pytest.approx(expected)


def test_cosine_is_that_of_transformers():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 5, 40)
    recipe = OptimRecipe(lr=1.0, schedule="cosine", warmup_steps=5)
    for step in range(40):
        assert lr_share(step, 40, recipe) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_the_final_share_is_reached():
    recipe = OptimRecipe(lr=1.0, schedule="linear", final_share=0.1)
    assert lr_share(10, 10, recipe) == pytest.approx(0.1)


def test_set_lr_scales_every_group():
    optimizer = build_optimizer(Parts(), OptimRecipe(lr=1e-3, projector_lr=1e-2))
    set_lr(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4, 5e-3}
