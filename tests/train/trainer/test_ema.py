import pytest
import torch
from torch import nn

from lapilli.train.trainer.optim import Average


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
