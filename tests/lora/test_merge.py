"""Merged equals unmerged."""

import pytest
import torch

from lapilli.lora.config import LoraConfig
from lapilli.lora.inject import adapter_tensors, inject
from lapilli.lora.merge import merge

CONFIG = LoraConfig(rank=3, alpha=6, targets=("*_proj", "lm_head"))


def _adapted(model):
    inject(model, CONFIG)
    for tensor in adapter_tensors(model).values():
        torch.nn.init.normal_(tensor, std=0.2)
    return model


def test_merged_equals_unmerged(build, run):
    model = _adapted(build())
    names = set(build().state_dict())
    with torch.no_grad():
        expected = run(model)
        report = merge(model)
        torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=1e-5)
    assert set(model.state_dict()) == names
    assert len(report.paths) == 15
    assert "lm_head" in report.paths
    assert not adapter_tensors(model)


def test_sum_is_taken_in_float32(build):
    model = _adapted(build()).bfloat16()
    layer = model.model.layers[0].mlp.up_proj
    delta = layer.scaling * layer.lora_B.weight.float() @ layer.lora_A.weight.float()
    expected = (layer.weight.float() + delta).bfloat16()
    merge(model)
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight.data, expected, atol=0, rtol=0.01
    )
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("trainable", [True, False])
def test_the_old_weight_is_not_written_to(build, trainable):
    model = _adapted(build())
    layer = model.lm_head
    old, copy = layer.weight.requires_grad_(trainable), layer.weight.detach().clone()
    merge(model)
    assert torch.equal(old, copy)
    assert model.lm_head.weight.requires_grad is trainable


def test_model_without_adapter_stays(build):
    model = build()
    assert merge(model).paths == ()
