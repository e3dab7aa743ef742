"""Adapters put beside layers by pattern and by name, merged away again, and refused."""

import warnings

import pytest
import torch

from lapilli.errors import ConfigError, MissingWeightsError, ShapeMismatchError
from lapilli.lora.inject import LoraConfig, adapter_tensors, inject, merge
from lapilli.lora.linear import LoraLinear


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank must be at least 1, found 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank must be at least 1, found 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out adapters belong to models"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ConfigError, match=match):
        LoraConfig(**{"rank": 2, "alpha": 4, **options})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.*.{q,k}_proj", [True, True, False]),
        ("{a,b}.1.{q,v}_proj", [True, False, True]),
        ("*", [True, True, True]),
        ("q_proj", [False, False, False]),
    ],
)
def test_targets(pattern, expected):
    config = LoraConfig(rank=1, alpha=1, targets=(pattern,))
    paths = ("a.1.q_proj", "a.2.k_proj", "a.1.v_proj")
    assert [config.is_target(path) for path in paths] == expected


def test_scaling():
    assert LoraConfig(rank=4, alpha=8).scaling("x") == 2.0
    assert LoraConfig(rank=4, alpha=8, use_rslora=True).scaling("x") == 4.0


ATTENTION = ("model.layers.*.self_attn.{q,v}_proj",)


def _oracle(model, **options):
    """The model with peft's adapters, and their tensors under our names."""
    import peft  # here: three seconds that only a run of these tests should pay

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model)
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
            tensors[name.replace(".default", "")] = parameter.detach().clone()
    return model.eval(), tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"r": 3, "lora_alpha": 6}, {"rank": 3, "alpha": 6}),
        (
            {"r": 4, "lora_alpha": 6, "use_rslora": True},
            {"rank": 4, "alpha": 6, "use_rslora": True},
        ),
        (
            {
                "r": 3,
                "lora_alpha": 6,
                "rank_pattern": {"layers.1.self_attn.q_proj": 5},
                "alpha_pattern": {"v_proj": 2},
            },
            {
                "rank": 3,
                "alpha": 6,
                "rank_pattern": {"layers.1.self_attn.q_proj": 5},
                "alpha_pattern": {"v_proj": 2},
            },
        ),
    ],
)
def test_numbers_equal_peft(build, run, theirs, ours):
    oracle, tensors = _oracle(build(), **theirs)
    model = build()
    report = inject(model, LoraConfig(**ours), tensors)
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(oracle), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(run(model), run(build()), atol=1e-2)
    assert report.paths == tuple(
        f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"
    )
    assert report.num_parameters == sum(t.numel() for t in tensors.values())


def test_fresh_adapter_changes_nothing_and_learns(build, run):
    model = build()
    before = run(model)
    inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))
    assert torch.equal(run(model), before)
    run(model.train()).square().mean().backward()
    assert all(
        (tensor.grad != 0).any() for name, tensor in adapter_tensors(model).items() if "B" in name
    )


def test_names_of_the_base_stay(build):
    plain, model = build(), build()
    inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))
    assert set(plain.state_dict()) < set(model.state_dict())
    model.load_state_dict(plain.state_dict(), strict=False)
    new = set(model.state_dict()) - set(plain.state_dict())
    assert new == set(adapter_tensors(model))
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in new


def test_tensors_come_back(build, run):
    first, second = build(), build()
    config = LoraConfig(rank=2, alpha=4, targets=("*proj",))
    inject(first, config)
    for tensor in adapter_tensors(first).values():
        torch.nn.init.normal_(tensor)
    inject(second, config, adapter_tensors(first))
    assert torch.equal(run(first), run(second))


def test_dropout_only_while_training(build, run):
    model = build()
    inject(model, LoraConfig(rank=2, alpha=4, dropout=0.5, targets=ATTENTION))
    for tensor in adapter_tensors(model).values():
        torch.nn.init.normal_(tensor)
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


def test_patterns_are_full_paths(build):
    paths = inject(build(), LoraConfig(rank=1, alpha=1, targets=("*.mlp.{gate,up}_proj",))).paths
    assert len(paths) == 4
    with pytest.raises(ConfigError, match="no linear layer matches q_proj, k_proj: patterns are"):
        inject(build(), LoraConfig(rank=1, alpha=1, targets=("q_proj", "k_proj")))


def test_low_precision_base_with_float32_adapter(build, run):
    model = build().bfloat16()
    inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_A.float()
            module.lora_B.float()
    assert run(model).dtype == torch.bfloat16


def test_refuses_a_tensor_without_a_layer(build):
    tensors = {"model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
    with pytest.raises(MissingWeightsError, match=r"1 adapter tensors .*layers\.9.*another base"):
        inject(build(), LoraConfig(rank=2, alpha=4), tensors)


def test_refuses_half_of_a_pair(build):
    tensors = {"lm_head.lora_A.weight": torch.zeros(2, 16)}
    with pytest.raises(MissingWeightsError, match=r"lm_head is incomplete: no lm_head\.lora_B"):
        inject(build(), LoraConfig(rank=2, alpha=4), tensors)


def test_refuses_an_empty_adapter(build):
    with pytest.raises(MissingWeightsError, match="no lora_A and lora_B tensors"):
        inject(build(), LoraConfig(rank=2, alpha=4), {})


@pytest.mark.parametrize("shapes", [((3, 16), (31, 2)), ((2, 16), (30, 2)), ((2, 15), (31, 2))])
def test_refuses_other_shapes_and_changes_nothing(build, shapes):
    model = build()
    tensors = {
        "lm_head.lora_A.weight": torch.zeros(shapes[0]),
        "lm_head.lora_B.weight": torch.zeros(shapes[1]),
    }
    with pytest.raises(ShapeMismatchError, match=r"lm_head.lora_[AB].weight: expected \["):
        inject(model, LoraConfig(rank=2, alpha=4), tensors)
    assert not adapter_tensors(model)


def test_refuses_a_second_adapter(build):
    model = build()
    inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))
    with pytest.raises(ConfigError, match="has an adapter already"):
        inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))


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
