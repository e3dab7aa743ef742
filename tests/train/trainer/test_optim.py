from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lapilli.checkpoint.keymaps import HF_LLAVA
from lapilli.checkpoint.load import load_checkpoint
from lapilli.train.recipe import OptimRecipe
from lapilli.train.trainer.optim import (
    Average,
    build_optimizer,
    lr_share,
    parameter_groups,
    set_lr,
    warmup_steps,
)
from tests.checkpoint.published import make_llava


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


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    ("schedule", "name"),
    [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")],
)
def test_schedules_are_those_of_transformers(schedule, name, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    recipe = OptimRecipe(lr=1.0, schedule=schedule, warmup_steps=warmup)
    for step in range(40):
        expected = theirs.get_last_lr()[0]
        assert lr_share(step, 40, recipe) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_the_final_share_is_reached():
    recipe = OptimRecipe(lr=1.0, schedule="linear", min_lr_ratio=0.1)
    assert lr_share(10, 10, recipe) == pytest.approx(0.1)


def test_set_lr_scales_every_group():
    optimizer = build_optimizer(Parts(), OptimRecipe(lr=1e-3, projector_lr=1e-2))
    set_lr(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4, 5e-3}


class Vectors(nn.Module):
    """Parameters of one axis that are neither biases nor of norms, and weights that are tied."""

    def __init__(self):
        super().__init__()
        self.image_newline = nn.Parameter(torch.zeros(3))
        self.embed = nn.Embedding(3, 3)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.embed.weight
        self.norm = nn.RMSNorm(3)


def decayed(model, **optim):
    groups = parameter_groups(model, OptimRecipe(lr=1.0, weight_decay=0.1, **optim))
    owner = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(owner)
    return {name for name, p in model.named_parameters() if owner[id(p)]}


def test_groups_are_those_of_the_original():
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
    from transformers.trainer_pt_utils import get_parameter_names

    for model in (Vectors(), Parts()):
        theirs = get_parameter_names(model, [*ALL_LAYERNORM_LAYERS, nn.RMSNorm])
        names = {name for name, _ in model.named_parameters()}
        assert decayed(model) == {n for n in theirs if "bias" not in n} & names


@pytest.mark.slow
@pytest.mark.parametrize("is_next", [False, True])
def test_groups_of_a_llava_are_those_of_transformers(tmp_path, is_next):
    """Of the same checkpoint, by the trainer that the original is built on."""
    from transformers import AutoModelForImageTextToText, Trainer

    make_llava(tmp_path / "llava", is_next=is_next)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    loaded = load_checkpoint(tmp_path / "llava", dtype="float32", device="cpu")
    expected = {HF_LLAVA.to_ours(n) for n in Trainer.get_decay_parameter_names(None, theirs)}
    model = loaded.model.requires_grad_(True)
    names = {HF_LLAVA.to_ours(n) for n, _ in theirs.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    assert len(expected) > 20
    assert decayed(model) == expected


def test_matrices_alone_may_decay():
    assert decayed(Vectors()) == {"image_newline", "embed.weight"}
    assert decayed(Vectors(), decay="matrices") == {"embed.weight"}


def test_warmup_is_a_share_rounded_up_unless_steps_are_given():
    from transformers import TrainingArguments

    assert warmup_steps(21, OptimRecipe(lr=1.0, warmup_ratio=0.03)) == 1
    assert warmup_steps(5198, OptimRecipe(lr=1.0, warmup_ratio=0.03)) == 156
    assert warmup_steps(21, OptimRecipe(lr=1.0, warmup_ratio=0.03, warmup_steps=7)) == 7
    assert warmup_steps(21, OptimRecipe(lr=1.0)) == 0
    for steps in (21, 100, 5198):
        asked = SimpleNamespace(warmup_steps=0.03, warmup_ratio=0.03)
        theirs = TrainingArguments.get_warmup_steps(asked, steps)
        assert warmup_steps(steps, OptimRecipe(lr=1.0, warmup_ratio=0.03)) == theirs
    recipe = OptimRecipe(lr=1.0, schedule="linear", warmup_ratio=0.1)
    shares = [lr_share(step, 20, recipe) for step in range(20)]
    assert shares[:3] == [0.0, 0.5, 1.0]


def test_sgd_is_the_plain_rule():
    model = Parts()
    optimizer = build_optimizer(model, OptimRecipe(lr=0.5, name="sgd", weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.1 if p.dim() > 1 else 0.0
        expected = before[name] - 0.5 * (2.0 + decay * before[name])
        torch.testing.assert_close(p.detach(), expected)


def test_adamw_is_the_rule_of_its_paper():
    """Loshchilov and Hutter 2019, algorithm 2, with numbers that each change what comes out."""
    model = Parts()
    recipe = OptimRecipe(lr=0.5, betas=(0.6, 0.8), eps=0.3, weight_decay=0.1)
    optimizer = build_optimizer(model, recipe)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = second = 0.0
    for step, gradient in enumerate((2.0, -1.0, 0.25), 1):
        first = 0.6 * first + 0.4 * gradient
        second = 0.8 * second + 0.2 * gradient**2
        towards = first / (1 - 0.6**step) / ((second / (1 - 0.8**step)) ** 0.5 + 0.3)
        for name, p in model.named_parameters():
            decay = 0.1 if p.dim() > 1 else 0.0
            expected[name] -= 0.5 * (towards + decay * expected[name])
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])


def new_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def test_the_average_is_the_recursion_of_its_definition():
    model = new_model()
    average, expected = Average(model, 0.7), model[1].weight.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            model[1].weight.add_(torch.randn(2, 4))
        keep = min(0.7, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * model[1].weight.detach()
        average.update(step)
    torch.testing.assert_close(average.tensors["1.weight"], expected)
    assert "0.bias" not in average.tensors


def test_a_short_run_is_not_held_at_its_start():
    model = new_model()
    average = Average(model, 0.9999)
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    for step in range(1, 21):
        average.update(step)
    assert (average.tensors["1.weight"] - 1.0).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_weights_come_back_bit_by_bit(dtype):
    model = new_model(dtype)
    average = Average(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    own = [p.detach().clone() for p in model.parameters()]
    with average.in_place():
        assert torch.equal(model[0].weight, average.tensors["0.weight"].to(dtype))
    assert all(map(torch.equal, own, model.parameters()))
    with pytest.raises(ZeroDivisionError), average.in_place():
        raise ZeroDivisionError
    assert all(map(torch.equal, own, model.parameters()))


def test_averages_of_half_precision_are_kept_in_single():
    model = new_model(torch.bfloat16)
    average = Average(model, 0.999)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    average.update(10_000)
    moved = average.tensors["1.weight"] - average.tensors["1.weight"].bfloat16().float()
    assert average.tensors["1.weight"].dtype == torch.float32
    assert moved.abs().max() > 0
    average.put_into_model()
    assert torch.equal(model[1].weight, average.tensors["1.weight"].bfloat16())
